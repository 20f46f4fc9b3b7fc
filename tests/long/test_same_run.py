"""`epsdpo verify`: faults put in one at a time are found where they begin, and what only rounds otherwise is none."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from kit import same_run as kit
from kit.official import OFFICIAL
from safetensors.torch import load_file, save_file

from epsdpo.__main__ import main
from epsdpo.experiment import check_experiment, load_experiments
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.experiment.values import flatten
from epsdpo.methods import kernels, trainer
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.methods.trainer import EpsilonDPOTrainer
from epsdpo.trajectory.same_run.causes import (
    BATCH,
    CRITERION,
    DATA,
    EPSILON,
    EVALUATION,
    LOSS,
    ORDER,
    PRECISION,
    REFERENCE,
    RULE,
    SCHEDULE,
    START,
    TOKENISATION,
    TRUNCATION,
    UPDATE,
)
from epsdpo.trajectory.same_run.quantities import RunNumbers

# Of the processor's features: what each environment asks for, and the numbers of threads that are trained with.
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
GOLD_RUNS = {"native": ({}, (1, 2)), "avx2": (AVX2, (1, 2)), "old": (OLD, (1,))}
OTHER_RUNS = {
    "native": ({}, (4,)),
    "avx2": (AVX2, (4,)),
    "old": (OLD, (2, 4)),
    "mixed": ({"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "SSE4_2"}, (1, 2, 4)),
    "avx": ({"ONEDNN_MAX_CPU_ISA": "AVX", "MKL_CBWR": "AVX"}, (1, 2)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    return kit.begin(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def repeats(batch):
    """Folders of runs that differ in threads and processor features alone, by environment and threads."""
    wanted = {name: GOLD_RUNS.get(name, ({}, ()))[1] + OTHER_RUNS[name][1] for name in OTHER_RUNS}
    processes = {}
    for name, threads in wanted.items():
        place = batch.with_name(f"{batch.name}-{name}")
        shutil.copytree(batch, place)
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        # Threads that wait for a core which they do not get would spin.
        environment |= {"OMP_WAIT_POLICY": "passive"} | OTHER_RUNS[name][0]
        command = [sys.executable, "-m", "kit.same_run", str(place), *map(str, threads)]
        subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True, text=True)
        processes |= {(name, number): place / str(number) for number in threads}
    return processes


@pytest.fixture(scope="module")
def gold(batch, repeats):
    """Five repeats, and two runs with other seeds."""
    folder = batch / "gold"
    for name, (_, threads) in GOLD_RUNS.items():
        for number in threads:
            assert main(["verify", str(repeats[name, number]), "--add-to", str(folder)]) == 0
    for seed in (43, 44):
        other = kit.train_run(batch, f"seed-{seed}", evaluated=True, seed=seed)
        assert main(["verify", str(other), "--add-to", str(folder)]) == 0
    assert len(list((folder / "eps").iterdir())) == 7
    return folder


def verify(capsys, run: Path, gold: Path) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", str(run), "--against", str(gold)])
    return code, capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "threads"), [(name, number) for name, (_, numbers) in OTHER_RUNS.items() for number in numbers]
)
def test_threads_and_processors_are_no_other_run(repeats, gold, capsys, name, threads):
    code, says = verify(capsys, repeats[name, threads], gold)
    assert code == 0 and says.startswith(("same bits", "the published run within prediction intervals")), says


# ------------------------------------------------------------------------------------------------------------ faults


def swap_sides(row: dict, ends: str = "1") -> dict:
    """Labels of the pairs whose number ends so; in 1 four of the first step do."""
    if not row["pair_id"].endswith(ends):
        return row
    other = {"chosen": "rejected", "rejected": "chosen"}
    return {**row, **{side + end: row[other[side] + end] for side in other for end in ("", "_ids")}}


def one_eos_more(row: dict) -> dict:
    return {**row, **{f"{side}_ids": [*row[f"{side}_ids"], 2] for side in ("chosen", "rejected")}}


def without_merges(model: Path) -> None:
    """A tokenizer that knows twenty words less."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-20]
    path.write_text(json.dumps(content), encoding="utf-8")


def other_weights(model: Path) -> None:
    path = model / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = load_file(path)
    noise = {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    save_file({name: weights[name] + noise[name] for name in weights}, path, metadata={"format": "pt"})


def patched_beta(monkeypatch, change):
    """`change` gets the rule, and all that it is called with."""
    monkeypatch.setattr(trainer, "updated_beta", lambda *args, **named: change(kernels.updated_beta, *args, **named))


def sign_of_the_step(published, beta, relaxed, tightened, **others):
    return published(beta, tightened, relaxed, **others)


def larger_step(published, beta, **others):
    return published(beta, **others | {"epsilon_step": 1.1 * others["epsilon_step"]})


def follow_policy(monkeypatch):
    """The reference is the policy as it was before the step."""
    record = EpsilonDPOTrainer._record_step

    def then_copy(self, *args, **named):
        record(self, *args, **named)
        self.ref_model.load_state_dict(self.model.state_dict())

    monkeypatch.setattr(EpsilonDPOTrainer, "_record_step", then_copy)


def another_reference(monkeypatch):
    begin = EpsilonDPOTrainer._restore_beta

    def then_load(self, *args):
        self.ref_model.load_state_dict(load_file(OFFICIAL / "ref" / "model.safetensors"))
        begin(self, *args)

    monkeypatch.setattr(EpsilonDPOTrainer, "_restore_beta", then_load)


def whole_window(monkeypatch):
    """The last window's loss is divided by the pairs of a whole one."""
    samples = EpsilonDPOTrainer.get_batch_samples

    def then_count(self, *args):
        batches = samples(self, *args)
        self._window_pairs = self.args.global_batch_size
        return batches

    monkeypatch.setattr(EpsilonDPOTrainer, "get_batch_samples", then_count)


def other_sign(monkeypatch):
    monkeypatch.setattr(trainer, "pair_steps", lambda *args: -kernels.pair_steps(*args))


def hinge(monkeypatch):
    monkeypatch.setattr(trainer, "dpo_loss", lambda margin, beta: torch.relu(1.0 - beta * margin))


def frozen_sum(monkeypatch):
    """The loss is right, and only the chosen response has a gradient."""
    score = EpsilonDPOTrainer.losses

    def losses(self, scored):
        own, beta = score(self, scored)
        half = 0.5 * own
        return half + half.detach(), beta

    monkeypatch.setattr(EpsilonDPOTrainer, "losses", losses)


@dataclass(frozen=True)
class Fault:
    """What is wrong with a run, where that shows first, and what it is to be called.

    Attributes:
        patch: done to the trainer.
        row, model: done to each prepared pair, and to the model's folder before the data are prepared.
        data: changes of the config with which data are prepared.
        changes: changes of the config.
    """

    step: int | None
    cause: str
    patch: Callable = lambda monkeypatch: None
    row: Callable | None = None
    model: Callable | None = None
    data: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)


def in_training(**keys) -> dict:
    return {"train": keys}


FAULTS = {
    "sign of the step": Fault(3, RULE, partial(patched_beta, change=sign_of_the_step)),
    "ε 10 % off": Fault(3, EPSILON, changes=in_training(epsilon=0.055)),
    "ε of β's step 10 % off": Fault(3, EPSILON, partial(patched_beta, change=larger_step)),
    "other β rule": Fault(3, RULE, changes=in_training(beta_update="mean_beta")),
    "β at the start": Fault(1, RULE, changes=in_training(beta=0.11)),
    "β stays": Fault(3, RULE, partial(patched_beta, change=lambda published, beta, **others: beta)),
    "one EOS more": Fault(1, TOKENISATION, row=one_eos_more),
    "another tokenizer": Fault(1, TOKENISATION, model=without_merges),
    "order of the file": Fault(1, ORDER, changes=in_training(train_sampling_strategy="sequential")),
    "another seed": Fault(1, ORDER, changes={"seed": 45}),
    "labels swapped": Fault(1, DATA, row=swap_sides),
    "a pair less": Fault(1, DATA, data={"data": {"max_train_pairs": 95}}),
    "completions cut": Fault(1, TRUNCATION, data=in_training(max_length=30), changes=in_training(max_length=30)),
    "start weights": Fault(1, START, model=other_weights),
    "reference follows the policy": Fault(3, REFERENCE, follow_policy),
    "another reference": Fault(1, REFERENCE, another_reference),
    "bfloat16 for float32": Fault(1, PRECISION, changes={"model": {"dtype": "bfloat16"}}),
    "criterion in bfloat16": Fault(3, CRITERION, changes=in_training(criterion_dtype="bfloat16")),
    "sign of the criterion": Fault(3, CRITERION, other_sign),
    "warm-up off by one": Fault(2, SCHEDULE, changes=in_training(warmup_steps=3)),
    "rate 10 % too high": Fault(2, SCHEDULE, changes=in_training(learning_rate=1.1e-3)),
    "linear for cosine": Fault(4, SCHEDULE, changes=in_training(lr_scheduler_type="linear")),
    "last window divided as a whole one": Fault(5, BATCH, whole_window),
    "half the batch": Fault(1, BATCH, changes=in_training(global_batch_size=10, per_device_train_batch_size=10)),
    "hinge for sigmoid": Fault(1, LOSS, hinge),
    "half the gradient": Fault(1, UPDATE, frozen_sum),
    "weights decay": Fault(3, UPDATE, changes=in_training(weight_decay=0.1)),
    "top-p 0.95": Fault(None, EVALUATION, changes={"evaluate": {"top_p": 0.95}}),
    "shorter answers": Fault(None, EVALUATION, changes={"evaluate": {"max_new_tokens": 9}}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_at_its_step_and_called_by_its_name(gold, tmp_path, monkeypatch, capsys, name):
    fault = FAULTS[name]
    place = kit.begin(tmp_path / "batch")
    if fault.model:
        fault.model(place / "model")
    if fault.model or fault.row or fault.data:
        kit.prepare_data(place, fault.row or (lambda row: row), **fault.data)
    fault.patch(monkeypatch)
    run = kit.train_run(place, "run", evaluated=fault.step is None, **fault.changes)
    code, says = verify(capsys, run, gold)
    assert code == 1 and says.startswith("another run: "), says
    assert ("evaluation, " if fault.step is None else f"step {fault.step}, ") in says, says
    assert f"Points to {fault.cause}: " in says, says


# ---------------------------------------------------------------------------------------------- harmless differences


def move(run: Path, to: Path) -> Path:
    """The batch as a whole, in another place."""
    shutil.copytree(run.parent, to, ignore=shutil.ignore_patterns("gold", "checkpoint-*", "seed-*"))
    return to / run.name


def as_of_another_machine(run: Path, to: Path) -> Path:
    """Its files as another machine with other places would have left them, by its own clock."""
    run = move(run, to)
    for name in ("manifest.json", "experiment.yaml"):
        for path in run.rglob(name):
            path.write_text(path.read_text(encoding="utf-8").replace(str(to.parent.parent), "/home/user/work"))
    manifest = run / "train" / "manifest.json"
    told = json.loads(manifest.read_text(encoding="utf-8"))
    told |= {"cpus": 64, "processor": "another", "platform": "another", "started": "2031-01-01T00:00:00+00:00"}
    manifest.write_text(json.dumps(told), encoding="utf-8")
    for path in run.rglob("*"):
        os.utime(path, (0, 0))
    return run


def without_data(run: Path, to: Path) -> Path:
    run = move(run, to)
    shutil.rmtree(run.parent / kit.DATA)
    return run


def without_evaluation(run: Path, to: Path) -> Path:
    run = move(run, to)
    shutil.rmtree(run / "evaluate")
    return run


MOVED = {
    "another folder": move,
    "another machine": as_of_another_machine,
    "no data left": without_data,
    "not evaluated": without_evaluation,
}


@pytest.mark.parametrize("name", MOVED)
def test_the_same_numbers_elsewhere_are_the_same_bits(repeats, gold, tmp_path, capsys, name):
    code, says = verify(capsys, MOVED[name](repeats["native", 1], tmp_path / "elsewhere"), gold)
    assert code == 0 and says.startswith("same bits"), says


HARMLESS = {
    "once more": {},
    "another name": {"name": "other", "title": "A run of another name"},
    "micro-batches of five": in_training(per_device_train_batch_size=5),
    "micro-batches of one": in_training(per_device_train_batch_size=1),
    "activations computed twice": in_training(activation_checkpointing=True),
    "no checkpoints": in_training(save_strategy="no"),
    "fewer logs": in_training(logging_steps=3),
    "another process loads data": in_training(dataloader_num_workers=1),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_changes_no_number_is_no_other_run(batch, gold, capsys, request, name):
    run = kit.train_run(batch, request.node.name.replace(" ", "-"), **HARMLESS[name])
    code, says = verify(capsys, run, gold / "eps")
    assert code == 0 and says.startswith(("same bits", "the published run within prediction intervals")), says


def test_a_run_that_was_interrupted_is_no_other(batch, gold, capsys, monkeypatch):
    def stop(self, *args, **named):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        record(self, *args, **named)

    record = EpsilonDPOTrainer._record_step
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(EpsilonDPOTrainer, "_record_step", stop)
        kit.train_run(batch, "interrupted")
    code, says = verify(capsys, kit.train_run(batch, "interrupted"), gold)
    assert code == 0 and says.startswith(("same bits", "the published run within prediction intervals")), says


# -------------------------------------------------------------------------------------------------- what else there is


def record_losses(folder: Path, losses: list[float], name: str = "simpo") -> Path:
    """A run of a method that keeps no table of pairs."""
    values = {"name": name, "method": "simpo", "train": {"beta": 2.0}}
    record = BetaRecord(folder / "train")
    record.rewind(0)
    record.announce(len(losses))
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "epoch": step / len(losses), "beta_before": 2.0, "beta_after": 2.0, "loss": loss}
        record.append(row | {"reward_margin": 0.1, "pairs_seen": 8 * step, "seconds": 0.1})
    record.finish()
    kit.finish(check_experiment(values, where="test"), folder, folder.parent / kit.DATA)
    return folder


LOSSES = [0.7 - 0.005 * step + 0.001 * (-1) ** step for step in range(30)]


def shifted(by: float, after: int = 0) -> list[float]:
    return [loss + by * (place >= after) for place, loss in enumerate(LOSSES)]


def test_a_method_without_a_table_of_pairs(tmp_path, capsys):
    gold = tmp_path / "gold"
    for number in range(3):
        again = record_losses(tmp_path / f"repeat-{number}", shifted(number * 1e-7))
        assert main(["verify", str(again), "--add-to", str(gold)]) == 0
    near = record_losses(tmp_path / "near", shifted(2.5e-7))
    assert verify(capsys, near, gold)[1].startswith("the published run within prediction intervals")
    code, says = verify(capsys, record_losses(tmp_path / "far", shifted(0.1, after=10)), gold)
    assert code == 1 and says.startswith("another run: simpo, step 12, loss, mean over steps 10 to 12: "), says
    code, says = verify(capsys, record_losses(tmp_path / "short", LOSSES[:20]), gold)
    assert (
        code == 1 and "step 21, the run has 20 steps, the published one 30" in says and f"Points to {BATCH}: " in says
    )


def test_worlds_of_one_recipe_are_repeats_of_each_other(tmp_path, capsys):
    gold = tmp_path / "gold"
    for seed in (1, 2, 3):
        run = record_losses(tmp_path / f"simpo-seed{seed}", shifted(0.01 * seed), f"simpo-seed{seed}")
        assert main(["verify", str(run), "--add-to", str(gold)]) == 0
    assert [folder.name for folder in gold.iterdir()] == ["simpo"]
    assert verify(capsys, tmp_path / "simpo-seed2", gold)[1].startswith("same bits: simpo-seed2, all 30 steps")
    fourth = record_losses(tmp_path / "simpo-seed4", shifted(0.025), "simpo-seed4")
    assert verify(capsys, fourth, gold)[1].startswith("the published run within prediction intervals")
    other = record_losses(tmp_path / "simpo-seed5", shifted(1.0), "simpo-seed5")
    code, says = verify(capsys, other, gold)
    assert code == 1 and says.startswith("another run: simpo-seed5, step 6, loss, mean over steps 4 to 6: "), says


def test_a_run_on_data_of_its_own(tmp_path, capsys):
    """As of a processor whose world is another: three data in gold, and a run on a fourth."""

    def on_data(labels: str, name: str, **changes: dict) -> Path:
        """A run on pairs of which those whose number ends so have their sides swapped."""
        place = kit.begin(tmp_path / name)
        kit.prepare_data(place, partial(swap_sides, ends=labels))
        return kit.train_run(place, name, **changes)

    gold = tmp_path / "gold"
    for labels in ("1", "2", "3"):
        assert main(["verify", str(on_data(labels, f"data-{labels}")), "--add-to", str(gold)]) == 0
    code, says = verify(capsys, on_data("4", "own"), gold)
    assert code == 0 and says.startswith("the published run within prediction intervals"), says
    assert says.endswith("of 3 repeats on data of their own")
    code, says = verify(capsys, on_data("4", "larger-step", **in_training(epsilon=0.055)), gold)
    assert code == 1 and "step 3, " in says and f"Points to {EPSILON}: " in says, says
    code, says = verify(capsys, on_data("4", "other-order", seed=45), gold)
    assert code == 1 and "step 1, " in says and f"Points to {ORDER}: " in says, says


@pytest.mark.parametrize("configs", ["demo", "paper_mini"])
def test_what_is_published_are_runs_of_the_configs_as_they_are(configs):
    """A config that is changed is another experiment, whose runs are to be published anew."""
    folder = REPOSITORY / "configs" / configs
    wanted = {experiment.name: flatten(experiment.model_dump()) for experiment in load_experiments([folder])}
    files = sorted((folder / "gold").glob("*/*.json.gz"))
    runs = [RunNumbers.of_text(gzip.decompress(file.read_bytes()).decode()) for file in files]
    assert {run.experiment for run in runs} == wanted.keys()
    assert {file.parent.name for file in files} == {recipe_and_world(name)[0] for name in wanted}
    for run in runs:
        for key, value in run.settings.items():
            assert value == wanted[run.experiment].get(key, value) or key == "seed", (run.experiment, key)
    assert sum(file.stat().st_size for file in files) < 25e6


def test_gold_that_is_none_is_refused(gold, repeats, tmp_path, capsys):
    run = str(repeats["native", 1])
    assert main(["verify", run]) == 2
    assert "of no finished experiment there is a published run" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    shutil.copytree(gold / "eps", tmp_path / "eps")
    first, *others = sorted((tmp_path / "eps").iterdir())
    first.write_bytes(first.read_bytes()[:-50])
    assert main(["verify", run, "--against", str(tmp_path)]) == 2
    assert "cannot be read as a published run" in capsys.readouterr().err
    for file in (first, *others[2:]):
        file.unlink()
    assert main(["verify", run, "--against", str(tmp_path)]) == 2
    assert "needs 3 repeats of one run at least" in capsys.readouterr().err
