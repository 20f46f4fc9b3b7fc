"""What is told of a batch and of a training while they run: by status, in lines, and in the chart that moves."""

import json
import shutil
from datetime import UTC, datetime

import pytest

from epsdpo.batch.progress import batch_status
from epsdpo.batch.stage import _left_by_others
from epsdpo.experiment import ConfigError
from epsdpo.methods.record import read_done_before
from epsdpo.runs.manifest import write_stage_file
from epsdpo.train.live import LiveChart
from epsdpo.train.pace import seconds_left
from epsdpo.train.progress_lines import ProgressLines


def plan(run_dir, *names, **more):
    (run_dir / ".epsdpo").mkdir(parents=True, exist_ok=True)
    stages = {name: {"stage": name.split("/")[-1], "folder": name, **more} for name in names}
    (run_dir / ".epsdpo" / "plan.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")


def begin(folder):
    """As a stage that begins in its folder now."""
    folder.mkdir(parents=True, exist_ok=True)
    write_stage_file(folder, stage="train", parts={}, started=datetime.now(UTC), **_left_by_others(folder))


def announce(folder, done_before, total=100):
    progress = {"total_steps": total, "done_before": done_before}
    (folder / "progress.partial").write_text(json.dumps(progress), encoding="utf-8")
    (folder / "progress.partial").replace(folder / "progress.json")


def record(folder, first, last, seconds):
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        for step in range(first, last + 1):
            row = {"step": step, "beta_after": 0.1, "loss": 0.7, "seconds": seconds(step)}
            file.write(json.dumps(row) + "\n")


def detail(run_dir):
    (status,) = batch_status(run_dir)
    assert status.state == "running"
    return status.detail


def test_time_left_is_told_once_it_means_something(tmp_path):
    folder = tmp_path / "eps" / "train"
    plan(tmp_path, "eps/train")
    begin(folder)
    assert detail(tmp_path) == "starting"
    announce(folder, 0)
    assert detail(tmp_path) == "starting"
    record(folder, 1, 2, lambda step: 60.0 if step == 1 else 2.0)  # the first takes long
    assert detail(tmp_path) == "step 2/100 · β 0.1 · loss 0.7000"
    record(folder, 3, 3, lambda step: 2.0)
    assert detail(tmp_path) == "step 3/100 · β 0.1 · loss 0.7000 · 3:14 left"
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "beta_af')  # being written
    assert detail(tmp_path).startswith("step 3/100")


def test_a_continued_training_does_not_begin_with_what_the_old_one_said(tmp_path):
    folder = tmp_path / "eps" / "train"
    plan(tmp_path, "eps/train")
    begin(folder)
    (folder / "stage.log").write_text("step 57/100 · of the old one\n", encoding="utf-8")
    announce(folder, 0)
    record(folder, 1, 57, lambda step: 9.0)
    assert detail(tmp_path).endswith("step 57/100 · β 0.1 · loss 0.7000 · 6:27 left")
    # Killed, and begun again: nothing that lies there is its own.
    begin(folder)
    assert detail(tmp_path) == "starting"
    with (folder / "stage.log").open("a", encoding="utf-8") as log:
        log.write("continuing eps from checkpoint-50\n\n")
    assert detail(tmp_path) == "continuing eps from checkpoint-50"
    # It goes back to step 50, and counts from there.
    (folder / "steps.jsonl").unlink()
    record(folder, 1, 50, lambda step: 9.0)
    announce(folder, 50)
    assert detail(tmp_path) == "continuing eps from checkpoint-50"
    record(folder, 51, 52, lambda step: 1.0)
    assert detail(tmp_path) == "step 52/100 · β 0.1 · loss 0.7000"
    record(folder, 53, 53, lambda step: 1.0)
    assert detail(tmp_path) == "step 53/100 · β 0.1 · loss 0.7000 · 0:47 left"


def test_what_another_stage_says_last_is_shown(tmp_path):
    folder = tmp_path / "data-1" / "prepare"
    plan(tmp_path, "data-1/prepare")
    begin(folder)
    assert detail(tmp_path) == "starting"
    (folder / "stage.log").write_text("world's SFT model: step 50 of 1400, 337 s left\n", encoding="utf-8")
    assert detail(tmp_path) == "world's SFT model: step 50 of 1400, 337 s left"
    (folder / "stage.log").write_bytes(b"Loading:   0%\rLoading:  50%\n \xff\xff\n")
    assert detail(tmp_path) == "\ufffd\ufffd"
    (folder / "stage.log").write_text("x" * 10_000, encoding="utf-8")
    assert set(detail(tmp_path)) == {"x"} and len(detail(tmp_path)) == 120


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b"\xff", b'{"total_steps": "many"}', b"[" * 3000, None], ids=repr
)
@pytest.mark.parametrize("name", ["progress.json", "steps.jsonl"])
def test_progress_that_cannot_be_read_is_no_progress(tmp_path, name, content):
    folder = tmp_path / "eps" / "train"
    plan(tmp_path, "eps/train")
    begin(folder)
    announce(folder, 0)
    record(folder, 1, 5, lambda step: 1.0)
    (folder / name).unlink()
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_bytes(content + b"\n")
    assert detail(tmp_path) == "starting"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"\xff", b'{"stages": []}', b'{"stages": {"a/train": {}}}', b"[" * 3000, None],
    ids=repr,
)
def test_a_plan_that_cannot_be_read_names_itself(tmp_path, content):
    plan(tmp_path, "eps/train")
    file = tmp_path / ".epsdpo" / "plan.json"
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{file} cannot be read. The same `epsdpo run` writes it anew"):
        batch_status(tmp_path)


def test_an_unknown_key_in_the_plan_is_left_alone(tmp_path):
    plan(tmp_path, "eps/train", of_a_later_version=1)
    assert [status.state for status in batch_status(tmp_path)] == ["waiting"]


@pytest.mark.parametrize("name", ["manifest.json", "stage.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b'{"key": "a', b"\xff"], ids=repr)
def test_a_stage_that_cannot_be_read_is_to_be_run_again(tmp_path, name, content):
    plan(tmp_path, "eps/train")
    begin(tmp_path / "eps" / "train")
    (tmp_path / "eps" / "train" / name).write_bytes(content)
    (status,) = batch_status(tmp_path)
    assert (status.state, status.detail) == ("interrupted", f"{name} cannot be read; the same command runs it again")


def test_the_status_of_a_copy_is_its_own(tmp_path):
    """Of a folder that is being worked on, and of what becomes of the original."""
    run = tmp_path / "run"
    plan(run, "eps/train", "eps/trajectory")
    begin(run / "eps" / "train")
    shutil.copytree(run, tmp_path / "copy")
    run.rename(tmp_path / "moved")
    assert [stage.state for stage in batch_status(tmp_path / "moved")] == ["running", "waiting"]
    assert [stage.state for stage in batch_status(tmp_path / "copy")] == ["interrupted", "waiting"]
    shutil.rmtree(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    for name in ("copy", "link"):
        assert [stage.state for stage in batch_status(tmp_path / name)] == ["interrupted", "waiting"]
        assert batch_status(tmp_path / name)[0].folder == tmp_path / name / "eps" / "train"


def test_seconds_left_are_those_of_the_usual_step():
    assert seconds_left([], 0, 5) is None and seconds_left([9.0, 1.0], 2, 5) is None
    assert seconds_left([60.0, 1.0, 1.0], 3, 5) == 5.0
    assert seconds_left([2.0], 10, 5) == 10.0  # one row for ten steps, as SFT writes them
    assert seconds_left([], 0, 0) == 0.0
    assert seconds_left([100.0] * 50 + [1.0] * 20, 70, 3) == 3.0


def test_a_slow_step_tells_its_micro_batches(make_trainer, tmp_path, capsys, monkeypatch):
    """Silence lasts no longer than the seconds between lines; here they are none, and nothing is left out."""
    monkeypatch.setattr("epsdpo.train.progress_lines._SECONDS_OF_SILENCE", 0.0)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 4, "logging_steps": 3}
    trainer = make_trainer(callbacks=[ProgressLines()], **settings)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert lines[0] == "step 1/4 under way: 1 of 3 micro-batches done"
    assert lines[1] == "step 1/4 under way: 2 of 3 micro-batches done"
    assert lines[2].startswith("step 1/4 · ") and "left" not in lines[2]
    of_third = [line for line in lines if line.startswith("step 3/4 ·")]
    assert len(of_third) == 1 and "loss" in of_third[0] and of_third[0].endswith(" left")


def test_an_evaluation_tells_its_batches(make_trainer, official_pairs, capsys, monkeypatch):
    monkeypatch.setattr("epsdpo.train.progress_lines._SECONDS_OF_SILENCE", 0.0)
    trainer = make_trainer(callbacks=[ProgressLines()], eval_pairs=official_pairs.select(range(16)))
    for _ in range(2):
        trainer.evaluate()
        assert "evaluating: 1 of 2 batches done\nevaluating: 2 of 2 batches done\n" in capsys.readouterr().out


def test_the_chart_tells_of_the_first_step_in_words(make_trainer, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(LiveChart, "_show", lambda self, what: shown.append(what))
    titles = []
    monkeypatch.setattr("epsdpo.train.live.as_image", lambda figure: figure)
    chart = LiveChart(tmp_path / "run", seconds_between=0.0, draw=lambda steps, title: titles.append(title))
    trainer = make_trainer(callbacks=[chart], gradient_accumulation_steps=2, max_steps=4)
    trainer.train()
    assert shown[0].data == "step 1/4 under way: 1 of 2 micro-batches done"
    assert titles[0] == "Step 1 of 4" and titles[-1] == "Step 4 of 4, done"
    assert [", about" in title for title in titles[1:-1]][-2:] == [False, True]  # once three steps are recorded
    assert read_done_before(tmp_path / "run") == 0


def test_a_record_tells_from_where_it_goes_on(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2, max_steps=3).train()
    make_trainer(max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert read_done_before(tmp_path / "run") == 2
