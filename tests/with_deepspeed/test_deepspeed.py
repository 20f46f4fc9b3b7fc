"""Two processes under DeepSpeed against one without: `make test-deepspeed`, as DeepSpeed is not in requirements.lock.

The processes are real ones on the CPU, over gloo, with the committed settings but for the number of processes.
"""

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

from epsdpo.methods.record import read_pairs

PAIRS = len(worker.TRAIN_PAIRS)
IN_FLOAT32 = [name for name in worker.RUNS if name not in ("bfloat16", *worker.OTHER_METHODS)]
EQUAL_IN_BFLOAT16 = [name for name, (_, settings) in worker.EQUAL.items() if settings.get("bf16")]
EQUAL_AS_LOADED = [name for name in worker.EQUAL if name not in EQUAL_IN_BFLOAT16]
STOPPED = "plain-resumed"
CPU_BACKEND = {"DS_ACCELERATOR": "cpu"}


@pytest.fixture(scope="module", params=[2, 3], ids="ZeRO-{}".format)
def stage(request):
    return request.param


def zero(stage, folder):
    return launcher(on_cpu("zero3.yaml", folder), "--zero_stage", str(stage))


@pytest.fixture(scope="module")
def together(stage, runs):
    """Every run of the worker in two processes."""
    folder = runs / f"zero{stage}"
    # DeepSpeed keeps the precision of the first model that it sees for all models of a process.
    for names in ([*IN_FLOAT32, STOPPED, *EQUAL_AS_LOADED], ["bfloat16", *EQUAL_IN_BFLOAT16]):
        run(*zero(stage, runs), ON_CPU, WORKER, folder, *names, **CPU_BACKEND)
    return folder


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_two_processes_train_as_one(name, alone, together):
    assert_same_run(alone / name, together / name, PAIRS)
    assert_same_log(alone / name, together / name)


@pytest.mark.parametrize("name", worker.EQUAL)
def test_equal_models_tie(name, together):
    assert_nothing_tells_apart(together / name, evaluations_of(together / name))


def test_a_stopped_run_continues_as_if_it_had_not_stopped(alone, together):
    assert_same_run(alone / "plain", together / STOPPED, PAIRS)


def test_each_process_keeps_only_its_shard(together):
    """Otherwise DeepSpeed was not at work, and the equality above says nothing about it."""
    shards = sorted(file.name for file in (together / STOPPED / "checkpoint-6").glob("global_step*/*optim_states.pt"))
    assert len(shards) == 2 and all("zero_pp_rank" in shard for shard in shards), shards


def test_shards_are_refused_where_they_cannot_be_read(stage, together):
    with pytest.raises(ValueError, match=rf"checkpoint-.* with DeepSpeed ZeRO-{stage} on 2 processes, and cannot be"):
        worker.finish(together, STOPPED)


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


def test_a_killed_run_continues_from_its_checkpoint(stage, tmp_path):
    config, killed = experiment(tmp_path), tmp_path / "killed"
    command = [*zero(stage, tmp_path), ON_CPU, "epsdpo.train", "--config", config, "--output", killed]
    kill_after_checkpoint(start(*command, **CPU_BACKEND), killed / "train" / "checkpoint-6")
    run(*command, **CPU_BACKEND)
    train_here(config, tmp_path / "alone")
    assert_same_run(tmp_path / "alone" / "train", killed / "train", PAIRS)
