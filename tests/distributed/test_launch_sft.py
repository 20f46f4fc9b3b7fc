"""SFT by two real processes, with DDP and FSDP2 over gloo, comes out as by one."""

import pytest
from kit import tiny_stages
from kit.launching import ON_CPU, launcher, on_cpu, run
from safetensors.torch import load_file

from epsdpo.data.prepared import prepare
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.methods.record import read_steps
from epsdpo.models.start import load_tokenizer
from epsdpo.train.launch import launch_sft, launcher_command
from epsdpo.train.sft import finetune


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with a config, its prepared data, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("sft")
    values = tiny_stages.settings(folder / "models")
    values["data"] = {"source": str(tiny_stages.write_conversations(folder / "pairs.jsonl"))}
    experiment = tiny_stages.experiment_of(values)
    tiny_stages.write_config(values, folder / "config.yaml")
    tokenizer = load_tokenizer(experiment)
    finetune(experiment, prepare(experiment.data, tokenizer, folder / "data", max_length=64), folder / "alone")
    return folder, experiment


def assert_same(one, other):
    assert read_steps(other)["loss"].tolist() == pytest.approx(read_steps(one)["loss"].tolist(), abs=1e-5)
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (weight - others[name]).abs().max() < 1e-6, name


def test_launched_from_a_notebook_with_ddp(alone):
    folder, experiment = alone
    command = launcher_command(str(REPOSITORY / "configs" / "accelerate" / "cpu.yaml"), 2, experiment)
    assert launch_sft(command, folder / "config.yaml", folder / "data", folder / "ddp") == folder / "ddp" / "model"
    assert_same(folder / "alone", folder / "ddp")


def test_sharded_with_fsdp2(alone):
    folder, _ = alone
    command = [*launcher(on_cpu("fsdp2.yaml", folder)), ON_CPU, "epsdpo.train.sft"]
    run(*command, "--config", folder / "config.yaml", "--data", folder / "data", "--train-dir", folder / "fsdp2")
    assert_same(folder / "alone", folder / "fsdp2")
