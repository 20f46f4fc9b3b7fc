"""Batches: what runs, what is left alone, what is refused. Processes are real, notebooks tiny."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.tiny_kit import TinyKit
from kit.waiting import wait_until


@pytest.fixture
def kit(tmp_path):
    return TinyKit(tmp_path)


def lines_of(err):
    return [line for line in err.splitlines() if not line.lstrip().startswith(("warnings.warn", "/"))]


def test_a_batch_is_run_once_and_again_only_where_something_changed(kit):
    kit.write_config("a_dpo", method="dpo")
    kit.write_config("b_eps", epsilon=0.01)
    code, out, _ = kit.run("run", "configs", "--dry-run")
    assert code == 0 and out.splitlines()[-1] == "6 of 6 stages would run"
    assert not (kit.folder / "runs").exists()

    code, out, err = kit.run("run", "configs", "--jobs", "2")
    assert code == 0, err
    first = kit.started()
    assert len(first) == 6
    assert set(first.values()) == {1}
    assert {path.name for path in kit.folder.iterdir()} == {"configs", "epsdpo", "notebooks", "runs", "started.log"}
    assert "[6/6] report/report: finished" in out

    # The same again: nothing. Neither for comments, whitespace and docstrings in code and notebooks.
    module = kit.folder / "epsdpo" / "methods" / "kernels.py"
    module.write_text(
        '"""Another docstring."""\n# A comment.\n' + module.read_text(encoding="utf-8").split('"""', 2)[2]
    )
    code, out, err = kit.run("run", "configs")
    assert code == 0, err
    assert kit.started() == first

    # Another ε: its training and what follows, and what stood there before is kept aside.
    kit.write_config("b_eps", epsilon=0.02)
    code, out, _ = kit.run("run", "configs", "--dry-run")
    assert "would run  b_eps/train: train.epsilon was 0.01, is 0.02" in out
    assert out.splitlines()[-1] == "3 of 6 stages would run"
    code, _, err = kit.run("run", "configs")
    assert code == 0, err
    again = kit.started() - first
    assert sorted(again) == ["b_eps/train", "b_eps/trajectory", "report"]
    run_dir = kit.folder / "runs" / "configs"
    (kept,) = (run_dir / "b_eps" / "superseded").glob("train-*")
    assert json.loads((kept / "manifest.json").read_text())["key_parts"]["settings"]["train.epsilon"] == 0.01

    manifest = kit.manifest("b_eps/train")
    assert manifest["status"] == "ok" and manifest["exit_code"] == 0 and manifest["global_batch_size"] == 128
    assert manifest["command"][1:3] == ["stage", "train"] and manifest["seeds"]["experiment"] == 42
    page = (run_dir / "index.html").read_text(encoding="utf-8")
    assert page.count('<span class="finished">finished</span>') == 6 and 'href="b_eps/trajectory/notebook.html"' in page


def commit(kit):
    """All but what is run, as a commit."""
    (kit.folder / ".gitignore").write_text("runs\n*.log\n__pycache__\n")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=kit.folder, check=True)
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=kit.folder, capture_output=True, text=True).stdout.strip()


def test_results_that_differ_in_code_alone_are_kept_where_that_is_asked_for(kit):
    kit.write_config("eps", epsilon=0.01)
    made = commit(kit)
    assert kit.run("run", "configs")[0] == 0
    before = kit.started()
    kernels = kit.folder / "epsdpo" / "methods" / "kernels.py"
    kernels.write_text(
        kernels.read_text(encoding="utf-8").replace("TOKENS_PER_TILE_ON_CPU = 512", "TOKENS_PER_TILE_ON_CPU = 256")
    )
    kept_by = commit(kit)

    _, out, _ = kit.run("run", "configs", "--dry-run")
    assert "would run  eps/train: epsdpo.methods.kernels changed\n" in out
    assert out.endswith("--keep-results would keep 1 of them, which differ in code alone\n3 of 4 stages would run\n")
    _, out, _ = kit.run("run", "configs", "--dry-run", "--keep-results")
    assert "would keep eps/train: epsdpo.methods.kernels changed\n" in out
    assert "would run  report/report: its input eps/train (kept) changed\n" in out  # it says what was kept
    assert out.endswith("1 of 4 stages would run\n") and "kept" not in kit.manifest("eps/train")

    code, out, err = kit.run("run", "configs", "--keep-results")
    assert code == 0, err
    assert "kept     eps/train, though epsdpo.methods.kernels changed" in out
    assert list(kit.started() - before) == ["report"]
    manifest = kit.manifest("eps/train")
    assert (manifest["git"]["commit"], manifest["kept"]["git"]["commit"]) == (made, kept_by)
    both = f"{made[:10]}, kept by {kept_by[:10]}"
    assert f"finished</span> (made by {both})" in (kit.folder / "runs" / "configs" / "index.html").read_text("utf-8")
    assert f"made by {both}" in kit.run("status", "runs/configs")[1]

    # Accepted once, it is that of this code; of other settings it is not.
    assert kit.run("run", "configs", "--dry-run")[1].endswith("0 of 4 stages would run\n")
    kit.write_config("eps", epsilon=0.02)
    _, out, _ = kit.run("run", "configs", "--dry-run", "--keep-results")
    assert "would run  eps/train: train.epsilon was 0.01, is 0.02" in out and "would keep" not in out


def test_one_failure_stops_what_needs_it_and_nothing_else(kit):
    kit.write_config("a_dpo", method="dpo", learning_rate=0.5)
    kit.write_config("b_eps")
    code, _, err = kit.run("run", "configs", "--jobs", "2")
    assert code == 1
    lines = lines_of(err)
    assert lines[0] == "failed   a_dpo/train: RuntimeError: <b>learning_rate</b> is too high"
    assert lines[1].endswith("a_dpo/train/stage.log")
    assert lines[2] == "not run  a_dpo/trajectory, because a stage that it needs failed"
    assert "compare_with" not in kit.manifest("b_eps/trajectory")["parameters"]  # the baseline cannot be had
    assert kit.started()["report"] == 1
    page = (kit.folder / "runs" / "configs" / "index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;learning_rate&lt;/b&gt; is too high" in page and "<b>learning_rate" not in page
    code, out, _ = kit.run("status", "runs/configs")
    assert code == 1 and "failed" in out

    # Mended, the failed stage and what waited for it are run, and the comparison that had to do without.
    kit.write_config("a_dpo", method="dpo")
    before = kit.started()
    code, _, err = kit.run("run", "configs")
    assert code == 0, err
    assert sorted(kit.started() - before) == ["a_dpo/train", "a_dpo/trajectory", "b_eps/trajectory", "report"]
    assert kit.manifest("b_eps/trajectory")["parameters"]["compare_with"] == "runs/configs/a_dpo/train"


def test_a_second_runner_and_a_slow_stage_are_ended_clearly(kit):
    kit.write_config("eps", beta=30.0)
    runner = kit.start("run", "configs", "--time-limit", "0.002")  # hours
    lock = kit.folder / "runs" / "configs" / ".epsdpo" / "lock.owner"
    wait_until(lock.exists)
    code, _, err = kit.run("run", "configs")
    assert code == 2
    assert f"is being worked on by another runner (process {runner.pid} on" in err
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1 and "eps/train: it took longer than its time limit of 0.002 hours" in err
    wait_until(lambda: not kit.processes(), seconds=60)


ODD = "-x {y} {}\n#2: a, <b>&amp; 😀 [z] it's $HOME"


def test_a_run_folder_may_have_any_name_and_be_copied_and_damaged(kit):
    kit.write_config("eps")
    code, out, err = kit.run("run", "configs", f"--output={ODD}")
    assert code == 0, err
    run_dir = kit.folder / ODD
    assert out.endswith(f"Index: {ODD}/index.html\nReport: {ODD}/report/notebook.html\n")
    assert kit.run("status", "--", ODD)[0] == kit.run("status", "--verify", "--", ODD)[0] == 0

    # A copy is its own, and nothing of it is due.
    shutil.copytree(run_dir, kit.folder / "copy")
    shutil.rmtree(run_dir)
    code, out, _ = kit.run("status", "copy")
    assert code == 0 and out.startswith("4 of 4 stages finished")
    assert kit.run("run", "configs", "--output", "copy", "--dry-run")[1].endswith("0 of 4 stages would run\n")

    # A manifest that a power failure emptied counts as none; what was edited is not read.
    (kit.folder / "copy" / "eps" / "trajectory" / "manifest.json").write_bytes(b"")
    steps = kit.folder / "copy" / "eps" / "train" / "steps.jsonl"
    steps.write_bytes(steps.read_bytes()[:40])
    code, _, err = kit.run("run", "configs", "--output", "copy")
    assert code == 1
    assert "failed   eps/trajectory: copy/eps/train/steps.jsonl has 40 bytes, and its stage left" in err
    assert "Restore it, or delete copy/eps/train, which the same `epsdpo run` then makes again" in err
    shutil.rmtree(steps.parent)
    code, _, err = kit.run("run", "configs", "--output", "copy")
    assert code == 0, err
    assert len(list((kit.folder / "copy" / "eps" / "superseded").glob("trajectory-unreadable"))) == 1


def run_mounted(kit, options, then="true"):
    """A batch in a run folder on a small file system of its own; `then` is run there before that is gone."""
    (kit.folder / "runs").mkdir()
    command = f"mount -t tmpfs -o {options} none runs && {sys.executable} -m epsdpo run configs; echo exit $?; {then}"
    environment = {**os.environ, "PYTHONPATH": str(kit.folder)}
    return subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        cwd=kit.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


may_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode != 0,
    reason="this machine lets nobody mount a file system of his own",
)


@may_mount
def test_a_read_only_folder_is_refused(kit):
    kit.write_config("eps")
    done = run_mounted(kit, "ro")
    assert done.stdout.strip() == "exit 2"
    assert (
        "runs/configs cannot be written to (Read-only file system). Choose another folder with --output" in done.stderr
    )


@may_mount
def test_a_full_disk_is_named_and_room_on_it_is_all_it_takes(kit):
    kit.write_config("eps", weight_decay=1.0)  # has training fill it
    again = f"rm runs/ballast && {sys.executable} -m epsdpo run configs; echo exit $?"
    done = run_mounted(kit, "size=16m", again)
    assert "exit 1" in done.stdout and "No space left on device" in done.stderr, done
    assert "Free some space and give the same command again" in done.stderr
    assert done.stdout.rstrip().endswith("exit 0"), done
    assert {stage.split("/")[-1]: count for stage, count in kit.started().items() if count > 1} == {"train": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs is 0; give 1 or more"),
        (["--gpus", "-1"], "--gpus is -1"),
        (["--time-limit", "0"], "--time-limit is 0 hours"),
        (["--profile", "no-such"], "--profile no-such: no such folder"),
        (["--num-processes", "2"], "no launch config"),
    ],
)
def test_resources_that_make_no_sense_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    from epsdpo.__main__ import main

    monkeypatch.chdir(tmp_path)
    Path("eps.yaml").write_text("method: epsilon_dpo\ntrain: {beta: 0.1}\n", encoding="utf-8")
    assert main(["run", "eps.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()
