"""Batches in which Snakemake, or the start of a stage, goes wrong: what is said, and that nothing counts as done.

Everything is real, and nothing comes so far that a notebook would be run.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from kit.waiting import wait_until

from epsdpo.batch import engine
from epsdpo.batch.engine import ENGINE_LOG, Resources
from epsdpo.batch.runner import look_at_batch, run_batch, sole_runner
from epsdpo.batch.specs import StageId
from epsdpo.experiment import ConfigError, check_experiment, save_experiment
from epsdpo.runs.layout import STATE_FOLDER


@pytest.fixture
def batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [check_experiment({"name": "eps", "method": "epsilon_dpo", "train": {"beta": 0.1}}, where="test")]


def assert_nothing_ran(outcome):
    assert not outcome.finished and not outcome.failed
    assert len(outcome.not_run) == 4
    assert set(outcome.not_run.values()) == {"because Snakemake ended before it was"}


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("executor: no-such-plugin\n", "invalid choice: 'no-such-plugin'"),
        ("executr: slurm\n", "unrecognized arguments: --executr=slurm"),
        (None, "no profile.yaml (or config.yaml) found"),
    ],
)
def test_snakemake_that_does_not_start_is_quoted(batch, tmp_path, profile, words):
    (tmp_path / "profile").mkdir()
    if profile is not None:
        (tmp_path / "profile" / "config.yaml").write_text(profile, encoding="utf-8")
    outcome = run_batch(batch, tmp_path / "run", Resources(profile="profile"))
    assert_nothing_ran(outcome)
    assert "ended with exit code" in outcome.trouble and words in outcome.trouble


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_snakemake_that_is_killed_before_its_first_stage(batch, tmp_path, number):
    def kill():
        children = psutil.Process().children
        wait_until(lambda: any("epsdpo.batch.workflow" in " ".join(child.cmdline()) for child in children()))
        for child in children():
            if "epsdpo.batch.workflow" in " ".join(child.cmdline()):
                child.send_signal(number)

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = run_batch(batch, tmp_path / "run")
    killer.join()
    assert_nothing_ran(outcome)
    assert outcome.trouble.endswith(f"was ended by signal {number.name}")


def test_what_a_cluster_says_of_jobs_is_read_from_the_log_of_snakemake():
    said = (
        "Error in rule data-1__prepare:\n    message: None\n    jobid: 1\n    output: ../data-1/manifest.json\n"
        "[Thu Nov 26 17:46:48 2026]\nError in rule eps__train:\n    message: sbatch failed. It said 'error: invalid\n"
        "error: partition'.\n    sbatch call:\n        sbatch -p none\n\n    jobid: 2\n    output: x\n"
    )
    due = [StageId("data-1", "prepare"), StageId("eps", "train"), StageId("eps", "trajectory")]
    found = engine._of_jobs(said, dict.fromkeys(due))
    assert list(found) == [StageId("eps", "train")]
    assert found[StageId("eps", "train")].startswith("sbatch failed. It said 'error: invalid\nerror: partition'.")


def test_a_profile_of_the_user_is_not_taken_and_no_temporary_folder_stays(batch, tmp_path, monkeypatch):
    """One that Snakemake would find by itself; and its own folders are those of the run, whatever HOME is."""
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "nowhere")
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    prepare = next(one for one in look_at_batch(batch, tmp_path / "run") if one.stage == "prepare")
    (tmp_path / "run" / prepare.folder / "stage.log").mkdir(parents=True)
    outcome = run_batch(batch, tmp_path / "run")
    assert list(outcome.failed) == [prepare], outcome
    assert "stage.log: Is a directory" in outcome.failed[prepare].error
    assert set(outcome.not_run.values()) == {"because a stage that it needs failed"}
    assert not outcome.trouble
    assert not list((tmp_path / "temporary").iterdir())
    assert {path.name for path in (tmp_path / "run" / ".epsdpo").iterdir()} >= {"stages", "snakemake.log"}
    assert not (tmp_path / "run" / ".epsdpo" / "scratch").exists()


def test_a_stage_is_given_back_the_temporary_folder_of_the_user(monkeypatch):
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/a 'b'")
    assert engine._own_temporary_folder().splitlines()[0] == """export TMPDIR='/a '"'"'b'"'"''"""
    assert "unset TMP\n" in engine._own_temporary_folder()


def test_a_file_in_the_place_of_a_stage_is_moved_aside(batch, tmp_path):
    (tmp_path / "run" / "eps").mkdir(parents=True)
    (tmp_path / "run" / "eps" / "train").write_text("stray", encoding="utf-8")
    standing = look_at_batch(batch, tmp_path / "run")[StageId("eps", "train")]
    assert standing.outdated and standing.reason == "something else than a folder is in its place"
    (tmp_path / "profile").mkdir()
    run_batch(batch, tmp_path / "run", Resources(profile="profile"))
    assert (tmp_path / "run" / "eps" / "superseded" / "train-unreadable").read_text(encoding="utf-8") == "stray"


def test_an_engine_log_that_cannot_be_written_is_named(batch, tmp_path):
    (tmp_path / "run" / ENGINE_LOG).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"snakemake\.log"):
        run_batch(batch, tmp_path / "run")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: (run / "index.html").mkdir(parents=True), r"index\.html is a folder, where the index is to be"),
        (lambda run: run.symlink_to("gone"), "run is a link to gone, which is not there"),
        (lambda run: save(run / "other", "eps"), "title 'eps' is that of .*run/other already. Give it another `title`"),
    ],
)
def test_a_run_folder_that_cannot_work_is_refused(batch, tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        run_batch(batch, tmp_path / "run")
    assert not (tmp_path / "run" / ".epsdpo").exists()


def save(folder, title):
    folder.mkdir(parents=True)
    values = {"name": folder.name, "title": title, "method": "dpo", "train": {"beta": 0.1}}
    save_experiment(check_experiment(values, where="test"), folder / "experiment.yaml")


def test_a_folder_whose_name_is_no_text_is_refused(batch, tmp_path):
    run_dir = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        run_batch(batch, run_dir)
    assert not run_dir.exists()


@pytest.mark.parametrize("owner", [None, b"", b"\xff"])
def test_a_lock_whose_owner_is_not_known_yet_is_a_refusal(tmp_path, owner):
    with sole_runner(tmp_path):
        path = tmp_path / ".epsdpo" / "lock.owner"
        path.unlink()
        if owner is not None:
            path.write_bytes(owner)
        with pytest.raises(ConfigError, match=r"by another runner \(which just began\)"), sole_runner(tmp_path):
            pass


STRAY = {
    "empty": b"",
    "half": b"name: eps\nmeth",
    "an object": b"{}",
    "not UTF-8": b"name: \xff\n",
    "an unknown key": b"name: other\ntitle: other\nmethod: dpo\ntrain: {}\nno_such_key: 1\n",
    "deep": b"[" * 1500,
}


@pytest.mark.parametrize("content", STRAY.values(), ids=STRAY)
def test_a_stray_folder_stops_no_batch(batch, tmp_path, content, caplog):
    """Not even where it is that of an experiment of the batch, whose config is written anew."""
    for name in ("other", "eps"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "experiment.yaml").write_bytes(content)
    (tmp_path / "run" / "folder" / "experiment.yaml").mkdir(parents=True)
    assert len(look_at_batch(batch, tmp_path / "run")) == 4
    assert "run/other/experiment.yaml cannot be read as the config of a run" in caplog.text
    assert "run/folder/experiment.yaml cannot be read as the config of a run" in caplog.text


def test_the_plan_says_where_things_lie_in_the_run(batch, tmp_path):
    (tmp_path / "profile").mkdir()
    run_batch(batch, tmp_path / "run", Resources(profile="profile"))
    plan = json.loads((tmp_path / "run" / ".epsdpo" / "plan.json").read_text(encoding="utf-8"))
    assert plan["stages"]["eps/train"] == {"stage": "train", "folder": "eps/train"}
    shutil.rmtree(tmp_path / "run")


def test_the_study_that_comes_last_has_all_cores(batch, tmp_path, monkeypatch):
    """Nothing is run: what the first stage needs is not there."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_dir = tmp_path / "run"
    prepare = next(one for one in look_at_batch(batch, run_dir) if one.stage == "prepare")
    (run_dir / prepare.folder / "stage.log").mkdir(parents=True)
    run_batch(batch, run_dir, Resources(jobs=3), real_text=True)
    state = run_dir / STATE_FOLDER
    threads = {rule["name"]: rule["threads"] for rule in json.loads((state / "batch.json").read_text())}
    assert threads.pop("real_text__real_text") == 3 and set(threads.values()) == {1}
    exports = f"export OMP_NUM_THREADS={os.cpu_count()}"
    for name in threads:
        assert exports not in (state / "stages" / f"{name}.sh").read_text()
    assert exports in (state / "stages" / "real_text__real_text.sh").read_text()


SNAKEFILE = """
import threading
rule all:
    input: [f"made/{number}" for number in range(20)]
rule one:
    output: "made/{number}"
    shell: "touch {output}"
onsuccess:
    with open("threads", "w") as file:
        file.write(str(threading.active_count()))
"""


def test_stages_that_ended_leave_the_scheduler_nothing_to_do(tmp_path):
    """Snakemake's limit of submissions would keep a timer for each, and look at all that waits when one runs out."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")
    command = [sys.executable, "-m", "epsdpo.batch.workflow", "--snakefile", "Snakefile", "--cores", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE) as process:
        assert process.wait(120) == 0
    assert int((tmp_path / "threads").read_text(encoding="utf-8")) < 15
