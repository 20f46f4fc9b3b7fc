"""Two processes against one on the same global batch: pairs, decisions, β, losses, weights, and continued runs.

The two processes are real ones, over gloo, started by `accelerate launch` with the committed files.
"""

import distributed_worker as worker
import pytest
import torch
import yaml
from launching import (
    ON_CPU,
    WORKER,
    assert_same_log,
    assert_same_run,
    kill_after_checkpoint,
    launcher,
    on_cpu,
    run,
    start,
    trained_weights,
)
from transformers import AutoModelForCausalLM

from epsdpo import train
from epsdpo.record import read_pairs, read_steps

PAIRS = len(worker.TRAIN_PAIRS)
CPU = "configs/accelerate/cpu.yaml"
STOPPED = ["plain-resumed", "fresh_adapter-resumed"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every run of the worker in this one process."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    worker.main(folder, list(worker.RUNS))
    torch.set_num_threads(torch_threads)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    """The same in two processes; here one process begins what two continue."""
    folder = tmp_path_factory.mktemp("ddp")
    for name in STOPPED:
        worker.begin(folder, name)
    run(*launcher(CPU), WORKER, folder, *worker.RUNS, *STOPPED)
    return folder


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp2")
    names = [*worker.RUNS, *STOPPED]
    run(*launcher(on_cpu("fsdp2.yaml", folder)), ON_CPU, "distributed_worker", folder, *names)
    return folder


@pytest.fixture(params=["ddp", "fsdp2"])
def together(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", [name for name in worker.RUNS if name != "bfloat16"])
def test_two_processes_train_as_one(name, alone, together):
    assert_same_run(alone / name, together / name, PAIRS)
    assert_same_log(alone / name, together / name)


def test_the_runs_can_tell_right_from_wrong(alone):
    """Steps are uneven, β moves, and the runs differ from one another: equality above says something."""
    steps = read_steps(alone / "plain")
    assert steps["pairs_seen"].diff().fillna(8).tolist() == [8, 8, 8, 8, 3] * 2
    assert steps["beta_after"].nunique() > 5
    assert read_pairs(alone / "fresh_adapter")["decision"].nunique() == 3  # ties while the adapter is the identity
    with pytest.raises(AssertionError):
        assert_same_run(alone / "plain", alone / "fresh_adapter", PAIRS)


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_continues_as_if_it_had_not_stopped(name, alone, together):
    """On two processes; those under DDP continue what one process began."""
    assert_same_run(alone / name.removesuffix(worker.RESUMED), together / name, PAIRS)


def test_bfloat16_keeps_its_log_probabilities(alone, together):
    """Those of the first step, from untrained weights, to the last bit; later ones drift apart with the rounding."""
    first, other = (read_pairs(run / "bfloat16").query("step == 1").sort_values("pair_id") for run in (alone, together))
    for column in ("decision", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"):
        assert other[column].tolist() == first[column].tolist(), column


def test_trained_models_are_whole_and_in_the_dtype_they_were_loaded_in(together):
    for name, dtype in {"plain": torch.float32, "bfloat16": torch.bfloat16, "tied": torch.float32}.items():
        model = AutoModelForCausalLM.from_pretrained(together / name / "model")
        assert model.dtype == dtype
        for key, weight in trained_weights(together / name).items():
            assert weight.dtype == dtype and weight.equal(model.state_dict()[key]), key
    assert "lm_head.weight" not in trained_weights(together / "tied")


@pytest.fixture
def config(tmp_path, official):
    for source in (*(official / "policy").iterdir(), *(official / "tok").iterdir()):
        (tmp_path / "start").mkdir(exist_ok=True)
        (tmp_path / "start" / source.name).write_bytes(source.read_bytes())
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(official / "pairs.jsonl"), "max_train_pairs": PAIRS},
        "model": {"name_or_path": str(tmp_path / "start")},
        "train": {**worker.SETTINGS, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3},
    }
    del values["train"]["disable_tqdm"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train_here(config, output):
    assert train.main(["--config", str(config), "--output", str(output)]) == 0


def test_a_killed_run_of_two_processes_continues_on_one(config, tmp_path):
    command = ["-m", "epsdpo.train", "--config", config, "--output"]
    train_here(config, tmp_path / "alone")
    run(*launcher(CPU), *command, tmp_path / "together")
    assert_same_run(tmp_path / "alone" / "train", tmp_path / "together" / "train", PAIRS)

    killed = tmp_path / "killed"
    kill_after_checkpoint(start(*launcher(CPU), *command, killed), killed / "train" / "checkpoint-6")
    assert not (killed / "train" / "model").exists()
    train_here(config, killed)
    assert_same_run(tmp_path / "alone" / "train", killed / "train", PAIRS)


def test_a_killed_run_under_fsdp2_continues_there_on_another_number_and_nowhere_else(config, tmp_path):
    sharded, killed = launcher(on_cpu("fsdp2.yaml", tmp_path)), tmp_path / "killed"
    command = [ON_CPU, "epsdpo.train", "--config", config, "--output", killed]
    kill_after_checkpoint(start(*sharded, *command), killed / "train" / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6 was written by a run with FSDP2 .*cannot be read with whole"):
        train_here(config, killed)
    run(*sharded, "--num_processes", "1", *command)
    train_here(config, tmp_path / "alone")
    assert_same_run(tmp_path / "alone" / "train", killed / "train", PAIRS)
