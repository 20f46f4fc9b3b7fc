"""Batches submitted to a Slurm cluster of one node by a copy of its profile: `make test-slurm`.

The plugin for Snakemake is not in requirements.lock, and Slurm is a system's. Cluster, jobs, Snakemake, stages and
kernels are real; where it does not matter what is computed, the notebooks do next to nothing.
"""

import json
import re
import signal
import subprocess
import sys

import pytest
import yaml
from kit import same_run, slurm
from kit.tiny_kit import REPOSITORY, STEPS, TinyKit, kill
from kit.waiting import wait_until

PROFILE = (REPOSITORY / "configs" / "cluster" / "slurm" / "config.yaml").read_text(encoding="utf-8")
# What a user changes: who pays, where stages run, and here how often jobs are looked at.
OWN_VALUES = {
    '  slurm_account: "your-account"\n': "",
    'slurm_partition: "gpu"': 'slurm_partition: "lab"',
    "status-checks: 20": "status-checks: 5",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.cluster_in(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def kit(cluster, tmp_path, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    write_profile(tmp_path, OWN_VALUES)
    tiny = TinyKit(tmp_path)
    yield tiny
    for process in tiny.processes():  # of a test that failed
        kill(process)


def write_profile(folder, values):
    text = PROFILE
    for old, new in values.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "profile").mkdir(exist_ok=True)
    (folder / "profile" / "config.yaml").write_text(text, encoding="utf-8")


def steps_in(run):
    record = run / "train" / "steps.jsonl"
    return record.read_text(encoding="utf-8").count("\n") if record.exists() else 0


def steps_of(kit, name):
    return steps_in(kit.folder / "runs" / "configs" / name)


PATIENCE = 600.0  # seconds, on a busy machine
SUBMIT = ("run", "configs", "--profile", "profile", "--jobs", "8")


def test_jobs_that_end_otherwise_than_well_are_told_and_the_same_command_goes_on(cluster, kit):
    """One is cancelled, one runs out of time, one fails, one ends well; then the node is drained, and comes back."""
    kit.write_config("cancelled", beta=8.0)
    kit.write_config("fails", learning_rate=0.5)
    kit.write_config("late", beta=24.0)
    kit.write_config("well", method="dpo")
    runner = kit.start(*SUBMIT)
    wait_until(lambda: steps_of(kit, "cancelled") or runner.poll() is not None, PATIENCE)
    jobs = cluster.jobs()
    asked = cluster.ask("scontrol", "show", "job", jobs["cancelled__train"][0])
    for words in ("Partition=lab", "TimeLimit=1-00:00:00", "NumCPUs=8", "MinMemoryNode=62.50G", "gres:gpu:1"):
        assert words in asked, asked
    prepare = next(number for name, (number, _) in jobs.items() if name.endswith("__prepare"))
    assert "gpu" not in cluster.ask("scontrol", "show", "job", prepare)
    cluster.ask("scancel", jobs["cancelled__train"][0])
    wait_until(lambda: steps_of(kit, "late") or runner.poll() is not None, PATIENCE)
    cluster.ask("scontrol", "update", f"JobId={jobs['late__train'][0]}", "TimeLimit=1")
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 1, err
    for name, words in (
        ("cancelled", r"SLURM-job '\d+' failed, SLURM status is: 'CANCELLED'"),
        ("late", r"SLURM-job '\d+' failed, SLURM status is: 'TIMEOUT'"),
        ("fails", "RuntimeError: <b>learning_rate</b> is too high"),
    ):
        assert re.search(rf"failed   {name}/train: {words}.*\n +log: \S+{name}/train/stage\.log\n", err), err
    assert kit.manifest("well/trajectory") and kit.manifest("report")
    done = {name: steps_of(kit, name) for name in ("cancelled", "late")}
    assert all(0 < steps < STEPS for steps in done.values()), done

    kit.write_config("fails", learning_rate=0.25)
    with cluster.drained():
        runner = kit.start(*SUBMIT)
        wait_until(lambda: len(cluster.active()) == 3 or runner.poll() is not None, PATIENCE)
        assert [state for _, state in cluster.active()] == 3 * ["PENDING"]
        assert {name: steps_of(kit, name) for name in done} == done
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 0, err
    assert all(steps_of(kit, name) == STEPS for name in ("cancelled", "fails", "late", "well"))
    started = kit.started()
    assert started["well/train"] == 1 and started["late/train"] == 2, started


def test_an_interrupt_cancels_what_was_submitted(cluster, kit):
    kit.write_config("slow", beta=60.0)
    runner = kit.start(*SUBMIT)
    wait_until(lambda: kit.started()["slow/train"] or runner.poll() is not None, PATIENCE)
    runner.send_signal(signal.SIGINT)
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 130 and "interrupted; the same command goes on" in err
    wait_until(lambda: not cluster.active(), seconds=40)
    assert cluster.jobs()["slow__train"][1] == "CANCELLED"


def test_a_training_that_is_told_to_end_saves_and_goes_back_into_the_queue(cluster, kit):
    """By the kit's own notebooks, on a tiny model. Told as `--signal` tells it, and when this test says so."""
    write_profile(kit.folder, {**OWN_VALUES, "# slurm_extra:": "slurm_extra:", "# slurm-requeue:": "slurm-requeue:"})
    steps = 600
    train = {"max_steps": steps, "logging_steps": 100, "save_strategy": "no"}
    real = same_run.begin(kit.folder / "real")  # without the copy of the kit that is called where it lies
    values = same_run.settings(real, train=train)
    (real / "eps.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "epsdpo", "run", "eps.yaml", "--profile", "../profile", "--jobs", "8"]
    run = real / "runs" / "eps" / "eps"
    runner = subprocess.Popen(command, cwd=real, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: steps_in(run) > 10 or runner.poll() is not None, PATIENCE)
    number, _ = cluster.jobs()["eps__train"]
    cluster.ask("scancel", "--signal=TERM", number)
    show = ("scontrol", "show", "job", number)
    wait_until(lambda: "Restarts=1" in cluster.ask(*show) or runner.poll() is not None, PATIENCE)
    log = (run / "train" / "stage.log").read_text(encoding="utf-8")
    (saved,) = re.findall(rf"told to end, and saved a checkpoint at step (\d+) of {steps}; the same command", log)
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 0, err
    assert 10 < int(saved) < steps_in(run) == steps
    assert f"checkpoint-{saved}" in (run / "train" / "stage.log").read_text(encoding="utf-8").removeprefix(log)
    assert cluster.jobs()["eps__train"] == (number, "COMPLETED")
    for stage in ("train", "trajectory", "evaluate"):
        assert json.loads((run / stage / "manifest.json").read_text(encoding="utf-8"))["status"] == "ok"
    assert (run.parent / "report" / "notebook.html").exists()


def test_what_slurm_refuses_is_quoted(kit):
    write_profile(kit.folder, {**OWN_VALUES, 'slurm_partition: "gpu"': 'slurm_partition: "none"'})
    kit.write_config("dpo", method="dpo")
    code, _, err = kit.run(*SUBMIT, timeout=PATIENCE)
    assert code == 1
    assert "prepare: SLURM sbatch failed. The error message was 'sbatch: error: invalid partition" in err
