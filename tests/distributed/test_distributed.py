"""Two processes against one on the same global batch: pairs, decisions, β, losses, weights, and continued runs.

The two processes are real ones, over gloo, started by `accelerate launch` with the committed files.
"""

import json

import pytest
import torch
from kit import distributed_worker as worker
from kit.launching import (
    ON_CPU,
    WORKER,
    assert_nothing_tells_apart,
    assert_same_log,
    assert_same_run,
    evaluations_of,
    experiment,
    kill_after_checkpoint,
    launcher,
    on_cpu,
    run,
    start,
    train_here,
    trained_weights,
)
from transformers import AutoModelForCausalLM

from epsdpo.methods.checkpoint_files import FILES_LIST
from epsdpo.methods.record import read_pairs, read_steps

PAIRS = len(worker.TRAIN_PAIRS)
CPU = "configs/accelerate/cpu.yaml"
STOPPED = ["plain-resumed", "fresh_adapter-resumed", "tr_dpo-resumed", "beta_dpo-resumed"]
BETA_RTOL = {"beta_dpo": 1e-4}  # it follows from margins, whose sums have another order


@pytest.fixture(scope="module")
def ddp(runs):
    """The runs of the worker in two processes; of those that are stopped, one process made the beginning."""
    folder = runs / "ddp"
    for name in STOPPED:
        worker.begin(folder, name)
    run(*launcher(CPU), WORKER, folder, *worker.RUNS, *worker.EQUAL, *STOPPED)
    return folder


@pytest.fixture(scope="module")
def fsdp2(runs):
    folder = runs / "fsdp2"
    run(*launcher(on_cpu("fsdp2.yaml", runs)), ON_CPU, WORKER, folder, *worker.RUNS, *worker.EQUAL, *STOPPED)
    return folder


@pytest.fixture(params=["ddp", "fsdp2"])
def together(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", [name for name in worker.RUNS if name != "bfloat16"])
def test_two_processes_train_as_one(name, alone, together):
    assert_same_run(alone / name, together / name, PAIRS, beta_rtol=BETA_RTOL.get(name, 0.0))
    assert_same_log(alone / name, together / name)


@pytest.mark.parametrize("name", worker.EQUAL)
def test_equal_models_tie(name, together):
    assert_nothing_tells_apart(together / name, evaluations_of(together / name))


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
    whole = name.removesuffix(worker.RESUMED)
    assert_same_run(alone / whole, together / name, PAIRS, beta_rtol=BETA_RTOL.get(whole, 0.0))


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
def config(tmp_path):
    return experiment(tmp_path)


def test_a_killed_run_of_two_processes_continues_on_one(config, tmp_path):
    killed = tmp_path / "killed"
    process = start(*launcher(CPU), "-m", "epsdpo.train", "--config", config, "--output", killed)
    kill_after_checkpoint(process, killed / "train" / "checkpoint-6")
    assert not (killed / "train" / "model").exists()
    train_here(config, killed)
    train_here(config, tmp_path / "alone")
    assert_same_run(tmp_path / "alone" / "train", killed / "train", PAIRS)


def test_the_list_of_a_checkpoint_has_the_files_of_all_processes(config, tmp_path):
    """Of a run that was killed; without the second process's random state it goes back to the checkpoint before."""
    launch, killed = [*launcher(on_cpu("fsdp2.yaml", tmp_path)), ON_CPU], tmp_path / "killed"
    command = [*launch, "epsdpo.train", "--config", config, "--output", killed]
    kill_after_checkpoint(start(*command), killed / "train" / "checkpoint-6")
    newest = killed / "train" / "checkpoint-6"
    listed = json.loads((newest / FILES_LIST).read_text(encoding="utf-8"))["files"]
    there = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert set(listed) == there - {FILES_LIST} and {"rng_state_0.pth", "rng_state_1.pth"} <= set(listed)
    shards = [name for name in listed if name.endswith(".distcp")]
    assert sum(name.startswith("optimizer_0/") for name in shards) == len(shards) / 2 == 2
    (newest / "rng_state_1.pth").unlink()
    log = run(*command)
    assert "passing over" in log and "checkpoint-6 holds no rng_state_1.pth" in log and "checkpoint-3" in log
    train_here(config, tmp_path / "alone")
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
