"""Finished stages whose files were changed since: held against their manifests, by whoever reads them."""

import json
import shutil
from datetime import UTC, datetime

import pytest

from epsdpo.__main__ import main
from epsdpo.batch.index import write_index
from epsdpo.batch.stage import run_stage
from epsdpo.experiment import ConfigError, check_experiment, save_experiment
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.runs.manifest import LARGEST_HASHED_BYTES, changed_outputs, write_manifest
from epsdpo.runs.verify import check_inputs

STEPS = [{"step": step, "beta_before": 0.1, "beta_after": 0.1 - 0.01 * step, "loss": 0.7} for step in (1, 2, 3, 4)]
FILES = {
    "data-1": {"train.parquet": "pairs"},
    "eps/train": {
        "steps.jsonl": "".join(json.dumps(step) + "\n" for step in STEPS),
        "notebook.html": "<p>no page</p>",
    },
    "eps/evaluate": {
        "generated.jsonl": '{"response": "good"}\n',
        "summary.json": '{"win_rate": 61.0, "win_rate_low": 55.0, "win_rate_high": 66.0}',
    },
    "eps/superseded/train-1": {"steps.jsonl": "of before"},
}


@pytest.fixture
def run(tmp_path):
    """A run folder with finished stages."""
    for name, files in FILES.items():
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
        facts = {"stage": "train", "parameters": {}, "facts": {}, "parts": {}, "inputs": []}
        write_manifest(folder, **facts, started=datetime.now(UTC), repository=REPOSITORY)
    values = {"name": "eps", "method": "epsilon_dpo", "train": {"beta": 0.1}}
    save_experiment(check_experiment(values, where="test"), tmp_path / "run" / "eps" / "experiment.yaml")
    (tmp_path / "run" / ".epsdpo").mkdir()
    (tmp_path / "run" / ".epsdpo" / "plan.json").write_text('{"stages": {}}')
    return tmp_path / "run"


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(file):
    """To the same size."""
    file.write_bytes(file.read_bytes().replace(b"o", b"0").replace(b"1", b"7"))


CHANGES = {
    "halved": (halve, r"has \d+ bytes, and its stage left \d+"),
    "edited": (edit, r"holds something else than its stage left \(its SHA-256 differs\)"),
    "gone": (lambda file: file.unlink(), "is gone"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "is gone"),
}


@pytest.mark.parametrize("name", ["eps/train/steps.jsonl", "eps/evaluate/generated.jsonl", "eps/evaluate/summary.json"])
@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_was_changed_is_named_with_a_remedy(run, capsys, name, change, words):
    assert main(["status", "--verify", str(run)]) == 0
    assert capsys.readouterr().out == "0 of 5 files of 3 finished stages have changed\n"
    change(run / name)
    folder = (run / name).parent
    remedy = f"Restore it, or delete {folder}, which the same `epsdpo run` then makes again"
    for given in (run, run / "eps", folder):
        with pytest.raises(ConfigError, match=rf"{run / name} {words}\. {remedy}"):
            check_inputs([given], run / "report")
        assert main(["status", "--verify", str(given)]) == 1
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith(f"changed  {run / name} ") and out[-1].startswith("1 of ")
    check_inputs([run / "data-1", run / name], run / "report")  # nor is a mere file of nobody's refused
    check_inputs([run], folder)  # what a stage left itself, it is about to make again


def test_pages_are_for_people_and_manifests_for_the_rest(run, capsys):
    edit(run / "eps" / "train" / "notebook.html")
    check_inputs([run], run / "report")
    (run / "data-1" / "manifest.json").write_bytes(b"")
    assert main(["status", "--verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert f"changed  {run}/data-1/manifest.json cannot be read" in out
    assert f"changed  {run}/eps/train/notebook.html" in out


def test_a_stage_refuses_inputs_that_were_changed(run, tmp_path):
    halve(run / "eps" / "train" / "steps.jsonl")
    parameters = {"train_dir": str(run / "eps" / "train"), "data_dir": str(run / "data-1"), "compare_with": ""}
    with pytest.raises(ConfigError, match=r"steps\.jsonl has \d+ bytes"):
        run_stage("trajectory", parameters, run / "eps" / "trajectory")
    for stage in ("report", "claims", "precision", "real_text"):
        links = {"links_from": str(run / "report")} if stage == "report" else {}
        with pytest.raises(ConfigError, match=r"steps\.jsonl has \d+ bytes"):
            run_stage(stage, {"run_dir": str(run), **links}, run / stage)
    with pytest.raises(ConfigError, match=r"steps\.jsonl has \d+ bytes"):
        run_stage("compare", {"runs": [str(run / "eps" / "train")]}, tmp_path / "compare")
    assert not (run / "eps" / "trajectory").exists()


def test_the_index_draws_nothing_that_was_changed(run):
    page = write_index(run).read_text(encoding="utf-8")
    assert "61.0" in page and ">0.06<" in page and "is not as its stage left it" not in page
    halve(run / "eps" / "train" / "steps.jsonl")
    page = write_index(run).read_text(encoding="utf-8")
    assert "61.0" in page and "train/steps.jsonl is not as its stage left it" in page and ">–<" in page
    edit(run / "eps" / "evaluate" / "summary.json")
    page = write_index(run).read_text(encoding="utf-8")
    assert "61.0" not in page and "evaluate/summary.json is not as its stage left it" in page


def test_large_files_are_compared_by_size(run, capsys):
    large = run / "data-1" / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(LARGEST_HASHED_BYTES)  # sparse
    (run / "data-1" / "manifest.json").unlink()
    facts = {"stage": "train", "parameters": {}, "facts": {}, "parts": {}, "inputs": []}
    write_manifest(run / "data-1", **facts, started=datetime.now(UTC), repository=REPOSITORY)
    assert main(["status", "--verify", str(run)]) == 0
    assert "1 of them large ones of which only the size is known" in capsys.readouterr().out
    with large.open("ab") as file:
        file.write(b"1")
    assert len(changed_outputs(run / "data-1")) == 1


def test_what_a_killed_writer_left_is_no_output(run, capsys):
    """The next one that writes there takes it away: it was listed, and missed by the stages that came after."""
    folder = run / "eps" / "train"
    for left in (folder / "manifest.json.partial", folder / "model.partial" / "model.safetensors"):
        left.parent.mkdir(exist_ok=True)
        left.write_text("hal", encoding="utf-8")
    (folder / "manifest.json").unlink()
    facts = {"stage": "train", "parameters": {}, "facts": {}, "parts": {}, "inputs": []}
    manifest = write_manifest(folder, **facts, started=datetime.now(UTC), repository=REPOSITORY)
    outputs = json.loads(manifest.read_text(encoding="utf-8"))["outputs"]
    assert outputs and not any("partial" in name for name in outputs)
    check_inputs([run], run / "report")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["outputs"]["manifest.json.partial"] = {"bytes": 3, "sha256": "0"}  # as manifests of before have it
    manifest.write_text(json.dumps(content), encoding="utf-8")
    check_inputs([run], run / "report")
    assert main(["status", "--verify", str(run)]) == 0


def test_checkpoints_and_weights_may_be_removed_as_a_whole(run):
    """From trainings; of other stages whatever is gone is missed."""
    for name, gone in (("eps/train", []), ("eps/evaluate", ["is gone", "is gone"])):
        folder = run / name
        facts = {"parameters": {}, "facts": {}, "parts": {}, "inputs": []}
        for file in ("checkpoint-2/state.json", "checkpoint-2/model.safetensors"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("whole", encoding="utf-8")
        (folder / "manifest.json").unlink()  # as a stage begins
        when = {"started": datetime.now(UTC), "repository": REPOSITORY}
        write_manifest(folder, stage=name.split("/")[1], **facts, **when)
        (folder / "checkpoint-2" / "state.json").unlink()
        assert [change.split(" ", 1)[1] for change in changed_outputs(folder)] == ["is gone"]
        shutil.rmtree(folder / "checkpoint-2")
        assert [change.split(" ", 1)[1] for change in changed_outputs(folder)] == gone


def test_a_folder_without_finished_stages_is_no_folder_to_verify(tmp_path, capsys):
    assert main(["status", "--verify", str(tmp_path)]) == 2
    assert "no stage has finished there" in capsys.readouterr().err


def test_a_copy_is_verified_by_itself(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    halve(run / "eps" / "train" / "steps.jsonl")
    assert main(["status", "--verify", str(tmp_path / "copy")]) == 0
    shutil.rmtree(run)
    assert main(["status", "--verify", str(tmp_path / "copy")]) == 0
