"""The notebooks before and after training, for real, on tiny models: sample → prepare → sft → train → evaluate."""

import json
import re
import shutil
from datetime import UTC, datetime

import pandas as pd
import pytest
from kit import tiny_stages

from epsdpo.batch.plan import plan_stages, standings
from epsdpo.batch.progress import PLAN, batch_status
from epsdpo.batch.runner import run_batch
from epsdpo.data.prepared import load_prepared
from epsdpo.methods.record import PROGRESS_FILE, STEPS_FILE, read_steps
from epsdpo.runs.manifest import write_stage_file

EXECUTED = ("sample", "prepare", "sft", "train", "evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder in which these stages were executed as planned, and the plan."""
    folder = tmp_path_factory.mktemp("run")
    values = tiny_stages.settings(folder / "models")
    prompts = {"source": values["data"]["on_policy"]["prompts"]["source"], "column": "prompt"}
    values["evaluate"] = {"prompts": prompts, "judge": None, "max_new_tokens": 8, "bootstrap_samples": 20}
    experiment = tiny_stages.experiment_of(values | {"trajectory": False})
    run_dir = folder / "run"
    outcome = run_batch([experiment], run_dir)
    assert not outcome.failed and not outcome.not_run
    planned = plan_stages([experiment], run_dir)
    return run_dir, {stage.stage: stage for stage in planned.values()}, planned


def test_each_stage_is_finished_as_the_plan_foresaw_it(run):
    _, stages, planned = run
    found = standings(planned)
    assert {stage: found[stages[stage].id].reason for stage in EXECUTED} == dict.fromkeys(EXECUTED, "finished")
    for stage in EXECUTED:
        page = (stages[stage].folder / "notebook.html").read_text(encoding="utf-8")
        assert "Traceback" not in page and not re.search(r'(?:src|href)="https?:', page)


def test_pairs_reach_sft_and_training(run):
    _, stages, _ = run
    pairs = pd.read_parquet(stages["sample"].folder / "pairs.parquet")
    prepared = load_prepared(stages["prepare"].folder)
    assert prepared.train["pair_id"][:] == pairs["pair_id"].tolist()
    assert len(read_steps(stages["sft"].folder)) > 0
    trained = json.loads((stages["train"].folder / "manifest.json").read_text(encoding="utf-8"))
    assert set(trained["key_parts"]["inputs"]) == {"data", "sft"}


def test_what_was_asked_lies_beside_the_folder_that_makes_way(run):
    run_dir, stages, _ = run
    kept = run_dir / "answers" / stages["sample"].folder.name
    assert {path.name for path in kept.iterdir()} >= {"generated.jsonl", "scores.jsonl"}
    assert not list(stages["sample"].folder.glob("*.jsonl"))


def test_evaluation_takes_the_sft_model_for_the_reference(run):
    _, stages, _ = run
    summary = json.loads((stages["evaluate"].folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["reference"] == str(stages["sft"].folder / "model")


def test_status_tells_how_far_sft_is(run, tmp_path):
    """As it looks while the stage runs, with this process as the one that works on it."""
    _, stages, _ = run
    folder = tmp_path / "sft-0" / "sft"
    folder.mkdir(parents=True)
    for name in (STEPS_FILE, PROGRESS_FILE):
        shutil.copy(stages["sft"].folder / name, folder)
    write_stage_file(folder, stage="sft", parts={}, started=datetime.now(UTC))
    (tmp_path / PLAN).parent.mkdir()
    plan = {"stages": {"sft-0/sft": {"stage": "sft", "folder": str(folder)}}}
    (tmp_path / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    (status,) = batch_status(tmp_path)
    steps = len(read_steps(folder))
    assert status.state == "running"
    assert re.match(rf"step {steps}/{steps} · loss \d+\.\d+ · 0:00 left", status.detail)
