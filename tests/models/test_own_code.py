"""Python that comes with a model is never run, and nobody is asked whether to: whatever loads it, in every command."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from kit.hostile_models import KINDS, hostile_model
from kit.official import OFFICIAL

from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer
from epsdpo.__main__ import main
from epsdpo.data.prepared import load_prepared
from epsdpo.evaluation.judge import load_judge
from epsdpo.experiment import ConfigError, check_experiment, save_experiment
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.catalogue import config_class, trainer_class
from epsdpo.methods.loading import read_tokenizer
from epsdpo.paper import epsilon_bound
from epsdpo.train import preferences as train
from epsdpo.train import sft

PACKAGE = Path(train.__file__).parent
LOADERS = ("from_pretrained", "from_config", "load_dataset", "pipeline", "LLM", "HFLM")
TRAIN = {
    "global_batch_size": 8,
    "per_device_train_batch_size": 8,
    "max_length": 64,
    "max_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "activation_checkpointing": False,
    "report_to": "none",
}


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A hostile model of a kind, with "y" on standard input; afterwards no code of any of them has been run."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    yield lambda kind="all of it", name="hostile": str(hostile_model(tmp_path / name, mark, kind))
    assert not mark.exists(), f"code was run: {mark.read_text()}"


@pytest.fixture
def config(tmp_path):
    """Write a config of a run on the tiny data; sections are changed by keyword."""

    def write(**sections):
        values = values_of(good_model(tmp_path / "good"))
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def values_of(model):
    return {
        "name": "tiny",
        "method": "epsilon_dpo",
        "data": {"source": str(OFFICIAL / "pairs.jsonl")},
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "train": TRAIN,
    }


def good_model(folder):
    for part in ("policy", "tok"):
        shutil.copytree(OFFICIAL / part, folder, dirs_exist_ok=True)
    return folder


def refused(capsys, said, code):
    """The command ended in exit code 2 and named what is hostile, with the remedy."""
    captured = capsys.readouterr()
    assert code == 2, captured
    told = captured.out + captured.err
    assert said in told and "never run" in told and "of a kind that transformers has" in told, told


@pytest.mark.parametrize("kind", KINDS)
def test_check(hostile, config, capsys, kind):
    model = hostile(kind)
    code = main(["check", str(config(model={"name_or_path": model}))])
    refused(capsys, f"model.name_or_path: {model} ", code)


def sections(model):
    """Where a config can name a model, each with the key that a message names it by."""
    ranker = {"source": "on_policy", "on_policy": {"prompts": {"source": "p.jsonl"}, "ranker": {"model": model}}}
    judges = {
        kind: {"prompts": {"source": "p.jsonl"}, "judge": {"kind": kind, "model": model}}
        for kind in ("causal_lm", "reward_model", "pair_ranker")
    }
    return {
        "model.chat_template": {"model": {"chat_template": model}},
        "data.on_policy.ranker.model": {"data": ranker},
        **{f"evaluate.judge.model, {kind}": {"evaluate": section} for kind, section in judges.items()},
    }


@pytest.mark.parametrize("place", sections(""))
def test_check_finds_every_model_that_a_config_names(hostile, config, capsys, place):
    model = hostile()
    code = main(["check", str(config(**sections(model)[place]))])
    refused(capsys, f"{place.split(',')[0]}: {model} ", code)


@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_work_refuse_before_any_work(hostile, config, capsys, tmp_path, kind):
    model, prepared, out = hostile(kind), tmp_path / "data", tmp_path / "out"
    path = str(config(model={"name_or_path": model}))
    run_dir = tmp_path / "run"
    trained = [["train", "--parameter", f"data_dir={prepared}"], ["sft", "--parameter", f"data_dir={prepared}"]]
    prepared.mkdir()
    for command in (
        ["run", path, "--output", str(run_dir)],
        ["run", path, "--output", str(run_dir), "--dry-run"],
        *(
            ["stage", *stage, "--parameter", f"config={path}", "--output", str(out)]
            for stage in [["prepare"], *trained]
        ),
    ):
        refused(capsys, f"model.name_or_path: {model} ", main(command))
    assert main(["config", path]) == 0  # which loads nothing
    assert not (out / "manifest.json").exists() and not (run_dir / "tiny").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with one trained experiment on a model without code."""
    run_dir = tmp_path_factory.mktemp("run")
    folder = run_dir / "tiny"
    folder.mkdir()
    values = values_of(good_model(run_dir.parent / "good"))
    save_experiment(check_experiment(values, where="test"), folder / "experiment.yaml")
    assert train.main(["--config", str(folder / "experiment.yaml"), "--output", str(folder)]) == 0
    manifest = {"stage": "train", "key": "key", "key_parts": {}, "git": None, "seconds": 1.0}
    (folder / "train" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return run_dir


@pytest.mark.parametrize("kind", KINDS)
def test_training_alone(hostile, config, capsys, tmp_path, finished, kind):
    model, data = hostile(kind), ["--data", str(finished / "tiny" / "data")]
    path = str(config(model={"name_or_path": model}))
    refused(capsys, model, train.main(["--config", path, "--output", str(tmp_path / "out")]))
    refused(capsys, model, train.main(["--config", path, "--output", str(tmp_path / "out"), *data]))
    path = str(config(model={"name_or_path": model, "sft": {"global_batch_size": 8}}))
    refused(capsys, model, sft.main(["--config", path, "--train-dir", str(tmp_path / "sft"), *data]))


class Marks:
    """Unpickled by a loader that trusts everything, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def test_weights_that_are_a_program(hostile, config, capsys, tmp_path, finished):
    model = good_model(tmp_path / "weights")
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Marks(tmp_path / "mark")}, model / "pytorch_model.bin")
    path, data = str(config(model={"name_or_path": str(model)})), ["--data", str(finished / "tiny" / "data")]
    refused(capsys, str(model), train.main(["--config", path, "--output", str(tmp_path / "out"), *data]))


def test_trained_models_of_a_folder_that_came_from_elsewhere(hostile, capsys, tmp_path, finished, monkeypatch):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    experiment, model = run_dir / "tiny", run_dir / "tiny" / "train" / "model"
    shutil.rmtree(model)
    hostile(name=model.relative_to(tmp_path))
    monkeypatch.setattr("epsdpo.evaluation.benchmarks.measure.harness_version", lambda: "0")
    (run_dir / ".epsdpo").mkdir()
    (run_dir / ".epsdpo" / "plan.json").write_text('{"stages": {}}', encoding="utf-8")
    refused(capsys, str(model), main(["benchmark", str(run_dir)]))
    folders = {
        "config": experiment / "experiment.yaml",
        "data_dir": experiment / "data",
        "train_dir": experiment / "train",
    }
    parameters = [part for name, path in folders.items() for part in ("--parameter", f"{name}={path}")]
    refused(capsys, str(model), main(["stage", "evaluate", "--output", str(tmp_path / "out"), *parameters]))
    options = ["--train-dir", folders["train_dir"], "--data", folders["data_dir"], "--output", tmp_path / "bounds"]
    refused(capsys, str(model), epsilon_bound.main(list(map(str, options))))


@pytest.mark.parametrize("kind", ["causal_lm", "reward_model"])
def test_judges(hostile, kind):
    with pytest.raises(ConfigError, match=r"evaluate\.judge\.model: .*hostile .* never run"):
        load_judge(JudgeSection(kind=kind, model=hostile()), 1.0)


@pytest.mark.parametrize("method", ["epsilon_dpo", "dpo", "beta_dpo", "ipo", "kto", "simpo", "orpo"])
@pytest.mark.parametrize("kind", ["all of it", "the model", "a part"])
def test_trainers_by_themselves(hostile, finished, tmp_path, method, kind):
    """As a library, without anything that looks at the model before."""
    data = load_prepared(finished / "tiny" / "data").train
    experiment = check_experiment({**values_of(OFFICIAL / "policy"), "method": method}, where="test")
    named = {
        "args": config_class(method)(str(tmp_path / "out"), **experiment.training_arguments()),
        "train_dataset": data,
        "eval_dataset": None,
        "processing_class": read_tokenizer(OFFICIAL / "tok"),
    }
    with pytest.raises(ValueError, match="never run|Unrecognized configuration class"):
        trainer_class(method)(model=hostile(kind), **named)


def test_the_trainer_looks_for_a_tokenizer_without_running_its_code(hostile, finished, tmp_path):
    model = Path(hostile("the tokenizer"))
    (model / "config.json").write_text((OFFICIAL / "policy" / "config.json").read_text(), encoding="utf-8")
    pairs = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    arguments = EpsilonDPOConfig(str(tmp_path / "out"), **TRAIN)
    with pytest.raises(ValueError, match="processing class"):
        EpsilonDPOTrainer(str(model), args=arguments, train_dataset=pairs)


def test_a_process_of_its_own_asks_nothing(hostile, config, tmp_path):
    """On standard input as a shell gives it."""
    command = [sys.executable, "-m", "epsdpo", "check", str(config(model={"name_or_path": hostile()}))]
    done = subprocess.run(command, input="y\n" * 100, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "y/N" not in done.stdout + done.stderr


def test_models_that_transformers_has_need_none_of_the_code_beside_them(hostile, config, capsys, tmp_path):
    """As Phi-3's on the hub: both are there, and transformers' own is taken."""
    model = Path(hostile())
    for name, part in (("config.json", "policy"), ("tokenizer_config.json", "tok")):
        own = json.loads((model / name).read_text())["auto_map"]
        content = {**json.loads((OFFICIAL / part / name).read_text()), "auto_map": own}
        (model / name).write_text(json.dumps(content), encoding="utf-8")
    assert main(["check", str(config(model={"name_or_path": str(model)}))]) == 0, capsys.readouterr().out
    assert (
        train.main(["--config", str(config(model={"name_or_path": str(model)})), "--output", str(tmp_path / "o")]) == 0
    )


def test_nothing_is_loaded_without_saying_so():
    """Every call that could load code says that it must not."""
    silent = []
    for file in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name not in LOADERS:
                continue
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if told.get("trust_remote_code") != "False":
                silent.append(f"{file.name}:{node.lineno} {ast.unparse(node)[:80]}")
    assert not silent
