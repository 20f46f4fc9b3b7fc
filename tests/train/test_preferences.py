"""The entry point: interrupted runs, refused checkpoints and folders, launch configs."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from kit.launching import REPOSITORY, run, start, train_here
from kit.official import save_official_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from epsdpo.experiment import load_experiment
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.runs.preempted import PREEMPTED
from epsdpo.train import preferences
from epsdpo.train.checkpoints import whole_checkpoints
from epsdpo.train.preferences import main


@pytest.fixture
def config(tmp_path, official):
    """A config file of a run of 36 steps on local files, with a last window of half size in each epoch."""
    model = save_official_model(tmp_path / "model")
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(official / "pairs.jsonl")},
        "model": {"name_or_path": str(model)},
        "train": {
            "beta": 0.1,
            "epsilon": 0.05,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "max_length": 128,
            "num_train_epochs": 3,
            "bf16": False,
            "activation_checkpointing": False,
            "save_strategy": "steps",
            "save_steps": 5,
            "logging_steps": 6,
            "use_cpu": True,
        },
    }
    return write_config(tmp_path / "run.yaml", values)


def write_config(path, values, **changes):
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train_command(config, output):
    return [sys.executable, "-m", "epsdpo.train", "--config", config, "--output", output]


def kill_after_step(process, train_dir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        lines = (train_dir / "steps.jsonl").read_text().count("\n") if (train_dir / "steps.jsonl").exists() else 0
        if lines >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.fixture
def one_thread():
    """As the processes of `kit.launching` have; CPU arithmetic depends on their number in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_resumes_as_if_it_had_not_been_killed(config, tmp_path, one_thread):
    """Killed twice: before its first checkpoint, and later between two of them."""
    train_here(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    for step in (2, 13):
        kill_after_step(start(*train_command(config, killed)), killed / "train", step)
    assert not (killed / "train" / "model").exists()
    assert "continuing run from" in run(*train_command(config, killed))

    assert_same_results(tmp_path / "whole" / "train", killed / "train")


def assert_same_results(whole, other):
    """Of two training folders, to the last bit; how long steps took is no result."""
    columns = [column for column in read_steps(whole).columns if column != "seconds"]
    pd.testing.assert_frame_equal(read_steps(other)[columns], read_steps(whole)[columns], check_exact=True)
    pd.testing.assert_frame_equal(read_pairs(other), read_pairs(whole), check_exact=True)
    assert len(read_pairs(other)) == 3 * 96
    for name, weight in load_file(whole / "model" / "model.safetensors").items():
        assert weight.equal(load_file(other / "model" / "model.safetensors")[name]), name


class Tells(TrainerCallback):
    """Sends its process a signal at the end of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_run_that_is_told_to_end_saves_a_checkpoint_and_goes_on_from_it(config, tmp_path, monkeypatch, capsys):
    """Told twice, within an epoch and at its end, though its config saves no checkpoints."""
    write_config(config, yaml.safe_load(config.read_text()), train__save_strategy="no")
    assert main(["--config", str(config), "--output", str(tmp_path / "whole")]) == 0
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    told = ["--config", str(config), "--output", str(tmp_path / "told")]
    for step, number in ((2, signal.SIGUSR1), (24, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            patch.setattr(preferences, "ProgressLines", partial(Tells, step, number))
            assert main(told) == PREEMPTED
        assert f"told to end, and saved a checkpoint at step {step} of 36; the same command" in capsys.readouterr().err
        assert list(whole_checkpoints(tmp_path / "told" / "train"))[-1] == step
        assert not (tmp_path / "told" / "train" / "model").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    assert main(told) == 0
    assert_same_results(tmp_path / "whole" / "train", tmp_path / "told" / "train")


def test_finished_run_is_not_repeated_and_another_config_is_refused(config, tmp_path, capsys, caplog):
    values = yaml.safe_load(config.read_text())
    write_config(config, values, train__max_steps=4)
    command = ["--config", str(config), "--output", str(tmp_path / "out")]
    caplog.set_level("INFO")
    assert main(command) == 0 and "is trained already" not in caplog.text
    assert main(command) == 0 and "is trained already" in caplog.text
    write_config(config, values, train__epsilon=0.07)
    assert main(command) == 2
    refused = capsys.readouterr().err
    assert "train.epsilon was 0.05, is 0.07" in refused and "--output" in refused


def test_checkpoint_cut_off_by_a_kill_is_passed_over(tmp_path):
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert list(whole_checkpoints(tmp_path)) == [5, 10]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_st')
    assert whole_checkpoints(tmp_path) == {5: tmp_path / "checkpoint-5"}
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert whole_checkpoints(tmp_path) == {}


def rewrite_state(checkpoint, change):
    path = Path(checkpoint) / "trainer_state.json"
    state = json.loads(path.read_text())
    change(state["stateful_callbacks"])
    path.write_text(json.dumps(state))


def test_checkpoint_without_beta_needs_consent(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "epsilon": 0.1}
    make_trainer(**settings).train()
    checkpoint = tmp_path / "run" / "checkpoint-3"
    rewrite_state(checkpoint, lambda callbacks: callbacks.pop("EpsilonDPO"))
    with pytest.raises(ValueError, match="step 3 holds no β.*fresh_beta=True"):
        make_trainer(**settings).train(resume_from_checkpoint=str(checkpoint))
    resumed = make_trainer(**settings, fresh_beta=True)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert read_steps(tmp_path / "run").set_index("step").loc[4, "beta_before"] == 0.1


def test_checkpoint_of_other_settings_is_refused(make_trainer, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(**settings).train()
    with pytest.raises(ValueError, match=r"epsilon: 0\.01 → 0\.02"):
        make_trainer(**settings, epsilon=0.02, epsilon_step=0.01).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
        )


def test_zero3_launch_config_is_what_the_recipes_are_meant_for():
    """Read as `accelerate launch` reads it: 16 processes, over which the global batch of 128 can be split."""
    launch = load_config_from_file(str(REPOSITORY / "configs" / "accelerate" / "multi_node_zero3.yaml"))
    assert launch.distributed_type == "DEEPSPEED" and launch.deepspeed_config["zero_stage"] == 3
    assert launch.mixed_precision == "no"  # which means: as the experiment's config says
    for recipe in ("table1_llama3", "table1_mistral"):
        train = load_experiment(REPOSITORY / "configs" / "paper" / recipe / "epsilon_dpo.yaml").train
        assert train["global_batch_size"] == 128
        assert 128 % (train["per_device_train_batch_size"] * launch.num_processes) == 0


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "accelerate").iterdir()), ids=lambda path: path.stem)
def test_every_launch_config_is_one_and_leaves_precision_to_the_experiment(path):
    launch = load_config_from_file(str(path))
    assert launch.mixed_precision == "no"  # anything else would override the experiment's silently
    assert launch.num_machines == (2 if path.stem.startswith("multi_node") else 1)
    assert launch.use_cpu == path.stem.endswith("cpu")
    if launch.distributed_type == "FSDP":
        assert launch.fsdp_config["fsdp_version"] == 2
