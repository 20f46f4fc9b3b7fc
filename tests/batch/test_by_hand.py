"""Notebooks run by hand with their defaults, in their own folder as JupyterLab does: they find what each other made."""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from epsdpo.batch.specs import STAGES
from epsdpo.experiment import ConfigError, claim_folder, load_experiment, load_variant
from epsdpo.experiment.paths import REPOSITORY

DEMO = REPOSITORY / "configs" / "demo" / "epsilon_dpo_fp32.yaml"
VALUES = {
    "title": "by hand",
    "method": "epsilon_dpo",
    "train": {
        "beta": 0.1,
        "epsilon": 0.01,
        "num_train_epochs": 1,
        "global_batch_size": 4,
        "per_device_train_batch_size": 4,
        "max_length": 256,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": True,
    },
    "evaluate": {"judge": None, "max_new_tokens": 4, "bootstrap_samples": 10},
}
# Pressing stop, as the kernel sees it.
STOPPED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, official):
    """A copy of what a user works with, whose default config is two steps of the tiny reference model."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, besides in {"epsdpo": [], "notebooks": ["runs"]}.items():
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*", *besides))
    (folder / "model").mkdir()
    for source in (*(official / "policy").iterdir(), *(official / "tok").iterdir()):
        shutil.copy(source, folder / "model")
    rows = [{"prompt": f"Say {n}", "chosen": f" {n} it is", "rejected": " No"} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prompts = [{"instruction": f"Say {n}"} for n in range(3)]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    values = {
        **VALUES,
        "data": {"source": str(folder / "pairs.jsonl")},
        "model": {"name_or_path": str(folder / "model")},
    }
    values["evaluate"]["prompts"] = {"source": str(folder / "prompts.json")}
    config = folder / DEMO.relative_to(REPOSITORY)
    config.parent.mkdir(parents=True)
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cells(checkout):
    """What each cell showed, by a name and a number: 02 before 01, 01, 02 with two sets of values, 03, 04, 05, a stop.

    All in one kernel, that is started where the notebooks lie.
    """
    turns = [
        ("too early", "train", {}),
        ("data", "prepare", {}),
        ("small ε", "train", {"overrides": ["train.epsilon=0.005", "train.beta=0.2"], "live": False}),
        ("DPO", "train", {"overrides": ["method=dpo"], "live": False}),
        ("trajectory", "trajectory", {}),
        ("answers", "evaluate", {}),
        ("report", "report", {}),
    ]
    joined = nbformat.v4.new_notebook()
    for name, stage, parameters in turns:
        for cell in nbformat.read(REPOSITORY / "notebooks" / STAGES[stage].notebook, as_version=4).cells:
            if cell.cell_type == "code":
                if "parameters" in cell.metadata.get("tags", []):
                    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
                joined.cells.append(nbformat.v4.new_code_cell(cell.source, metadata={"turn": name}))
    joined.cells.append(nbformat.v4.new_code_cell(STOPPED, metadata={"turn": "stopped"}))
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    resources = {"metadata": {"path": str(checkout / "notebooks")}}
    client = NotebookClient(joined, timeout=300, allow_errors=True, resources=resources)
    client.execute(env=environment)
    return joined.cells


def outputs(cells, turn, kind):
    shown = [output for cell in cells if cell.metadata["turn"] == turn for output in cell.outputs]
    return [output for output in shown if output.output_type == kind]


def texts(cells, turn):
    """All that a turn printed and displayed."""
    printed = [output.text for output in outputs(cells, turn, "stream")]
    shown = [*outputs(cells, turn, "display_data"), *outputs(cells, turn, "execute_result")]
    return "\n".join([*printed, *("".join(output.data.get("text/html", "")) for output in shown)])


def test_training_without_data_says_what_to_run_first(cells):
    first = outputs(cells, "too early", "error")[0]
    assert first.ename == "ConfigError" and "runs/notebooks/data: no such file or folder" in first.evalue
    assert "Run 01_prepare_data first, or give the folder that it wrote" in first.evalue


def test_nothing_else_fails(cells):
    for turn in ("data", "small ε", "DPO", "trajectory", "answers", "report"):
        assert [error.evalue for error in outputs(cells, turn, "error")] == [], turn


def test_each_set_of_values_has_a_folder_of_its_own(cells, checkout):
    by_hand = checkout / "runs" / "notebooks"
    names = {"small ε": "epsilon_dpo_fp32-epsilon0.005-beta0.2", "DPO": "epsilon_dpo_fp32-method-dpo"}
    for turn, name in names.items():
        assert (by_hand / name / "train" / "model").is_dir(), turn
        saved = yaml.safe_load((by_hand / name / "experiment.yaml").read_text(encoding="utf-8"))
        assert saved["name"] == name
    assert not (checkout / "notebooks" / "runs").exists()
    betas = [
        json.loads((by_hand / name / "train" / "steps.jsonl").read_text().splitlines()[0]) for name in names.values()
    ]
    assert [row["beta_before"] for row in betas] == [0.2, 0.1]


def test_paths_that_are_printed_are_where_files_lie(cells, checkout):
    for turn in ("data", "small ε", "DPO"):
        last = [cell for cell in cells if cell.metadata["turn"] == turn][-1]
        lines = "".join(output.text for output in last.outputs).splitlines()
        paths = [Path(line.split("  ")[0]) for line in lines]
        assert len(paths) >= 2 and all(path.is_absolute() and path.exists() for path in paths), lines


def test_later_notebooks_open_what_was_just_made(cells, checkout):
    latest = checkout / "runs" / "notebooks" / "epsilon_dpo_fp32-method-dpo"
    assert (latest / "trajectory" / "beta.png").exists() and (latest / "evaluate" / "summary.json").exists()
    report = texts(cells, "report")
    assert "dpo (epsilon_dpo_fp32.yaml)" in report and "by hand, ε=0.005, β=0.2" in report
    assert "no judge was asked for" in report and "No judge was asked for." in "\n".join(
        output.data["text/markdown"]
        for output in outputs(cells, "report", "display_data")
        if "text/markdown" in output.data
    )
    assert "No judge was asked for" in texts(cells, "answers")


def test_the_page_of_dpo_does_not_say_that_its_decisions_move_beta(cells, checkout):
    content = (checkout / "runs/notebooks/epsilon_dpo_fp32-method-dpo/trajectory/beta_steps.html").read_text("utf-8")
    assert "No pair would have moved β here." in content and "No pair moved β here." not in content
    assert "here β does not follow it" in texts(cells, "trajectory")


def test_tables_are_headed_in_words(cells):
    for turn in ("small ε", "trajectory", "answers", "report"):
        heads = re.findall(r"<th[^>]*>([^<]*)</th>", texts(cells, turn))
        settings = {"global_batch_size", "max_length"} | set(VALUES["train"])  # keys of the config, by their names
        in_code = {head for head in heads if re.fullmatch(r"[a-z]+(_[a-z]+)+", head)} - settings
        assert not in_code - {"criterion_dtype", "epsilon_step"}, turn
    assert "β at start" in texts(cells, "small ε")


def test_a_stop_is_one_line(cells):
    (error,) = outputs(cells, "stopped", "error")
    assert error.ename == "KeyboardInterrupt"
    assert error.traceback == ["Interrupted. What was kept so far stays: run the notebook again to go on from there."]


@pytest.mark.parametrize(
    ("overrides", "name", "title"),
    [
        (None, "epsilon_dpo_fp32", "ε-DPO, float32 criterion"),
        (["train.epsilon=0.02"], "epsilon_dpo_fp32-epsilon0.02", "ε-DPO, float32 criterion, ε=0.02"),
        (
            ["method=simpo", "train.beta=2.0"],
            "epsilon_dpo_fp32-method-simpo-beta2.0",
            "simpo (epsilon_dpo_fp32.yaml), β=2.0",
        ),
        (["seed=3", "title=Mine"], "epsilon_dpo_fp32-seed3-title-Mine", "Mine"),
    ],
)
def test_values_on_top_name_the_experiment(overrides, name, title):
    """Of another method without the keys that mean nothing under it."""
    experiment = load_variant(DEMO, overrides)
    assert (experiment.name, experiment.title) == (name, title)
    assert ("epsilon" in experiment.train) == (experiment.method == "epsilon_dpo")


def test_values_too_long_for_a_name_are_cut_and_told_apart(tmp_path):
    """A folder that such a run was claimed in can be read again."""
    experiments = [load_variant(DEMO, [f"model.name_or_path=/{'a' * 300}{end}"]) for end in "bc"]
    names = {experiment.name for experiment in experiments}
    assert len(names) == 2 and {len(name) for name in names} == {200}
    assert all(name.startswith("epsilon_dpo_fp32-") for name in names)
    claimed = claim_folder(experiments[0], tmp_path / "train", lambda model: model)
    assert load_experiment(tmp_path / "train" / "experiment.yaml").name == claimed.name


def test_values_on_top_are_refused_as_those_of_set_are():
    with pytest.raises(ConfigError, match=r"--set train.epsilom=0.02: train.epsilom is unknown"):
        load_variant(DEMO, ["train.epsilom=0.02"])
    with pytest.raises(ConfigError, match=r"--set: train.epsilon has no effect under method 'simpo'"):
        load_variant(DEMO, ["method=simpo", "train.epsilon=0.02"])
