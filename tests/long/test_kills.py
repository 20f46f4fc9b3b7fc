"""Whatever is killed of a batch, one at a time: it is told, nothing is left running, and the same command finishes."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from kit.tiny_kit import STEPS, TinyKit, kill
from kit.waiting import wait_until


@pytest.fixture
def kit(tmp_path):
    return TinyKit(tmp_path)


def test_whatever_is_killed_the_same_command_finishes(kit):
    """The runner itself, then a kernel: training goes on after its last recorded step, and nothing is left running."""
    kit.write_config("eps", beta=1.5)  # seconds for each of its steps
    record = kit.folder / "runs" / "configs" / "eps" / "train" / "steps.jsonl"

    runner = kit.start("run", "configs")
    wait_until(lambda: record.exists() and record.read_text().count("\n") >= 1)
    kill(next(process for process in kit.processes() if process.pid == runner.pid))
    runner.communicate()
    wait_until(lambda: not kit.processes(), seconds=60)
    steps = record.read_text().count("\n")
    assert 1 <= steps < STEPS
    code, out, _ = kit.run("status", "runs/configs")
    assert code == 1 and "interrupted" in out

    runner = kit.start("run", "configs")
    wait_until(lambda: record.read_text().count("\n") > steps)
    kill(next(process for process in kit.processes() if "ipykernel_launcher" in " ".join(process.cmdline())))
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1 and "its kernel was killed from outside" in err

    code, out, err = kit.run("run", "configs")
    assert code == 0, err
    rows = [json.loads(line)["step"] for line in record.read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
    assert kit.started()["eps/train"] == 3
    assert all(count == 1 for stage, count in kit.started().items() if stage != "eps/train")


def test_whatever_snakemake_or_a_stage_dies_of_is_no_success(kit):
    kit.write_config("eps", beta=1.5)  # seconds for each of its steps
    runs = kit.folder / "runs" / "configs"

    def in_training(runner, name, experiment="eps"):
        record = runs / experiment / "train" / "steps.jsonl"
        wait_until(lambda: record.exists() and b'"step": 1,' in record.read_bytes())
        return next(
            child for child in psutil.Process(runner.pid).children(recursive=True) if name in " ".join(child.cmdline())
        )

    runner = kit.start("run", "configs")
    in_training(runner, "epsdpo.batch.workflow").send_signal(signal.SIGKILL)
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1
    assert "not run  eps/train, because Snakemake ended before it was" in err
    assert "Snakemake, which runs the stages, was ended by signal SIGKILL" in err
    wait_until(lambda: not kit.processes(), seconds=60)

    (runs / "eps" / "train" / "steps.jsonl").unlink()
    kit.write_config("other", beta=1.6)
    runner = kit.start("run", "configs", "--jobs", "2")
    for experiment, number in (("eps", signal.SIGTERM), ("other", signal.SIGKILL)):
        stage = in_training(runner, f"-m epsdpo stage train --output=runs/configs/{experiment}/", experiment)
        stage.send_signal(number)
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1
    assert "failed   eps/train: its process was ended by signal SIGTERM" in err
    assert "failed   other/train: its process was killed; most often" in err
    assert "not run  report/report, because a stage that it needs failed" in err

    (kit.folder / "configs" / "other.yaml").unlink()
    (runs / "eps" / "train" / "steps.jsonl").unlink()
    runner = kit.start("run", "configs")
    in_training(runner, "-m epsdpo stage train")
    runner.terminate()
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 143
    assert "terminated; the same command goes on from here, training from its last checkpoint" in err
    wait_until(lambda: not kit.processes(), seconds=60)
    assert not (runs / ".epsdpo" / "scratch").exists()

    # Its reader gone, and with a limit of the size of files: the one is nothing, the other is named.
    command = f"ulimit -f 64; {sys.executable} -m epsdpo run configs | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(kit.folder)}
    done = subprocess.run(["bash", "-c", command], cwd=kit.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "3 of 4 stages are to be run\n"
    assert "failed   eps/train: OSError: [Errno 27] File too large" in done.stderr and "Traceback" not in done.stderr


def warm_process(runner: subprocess.Popen) -> psutil.Process:
    return next(
        child for child in psutil.Process(runner.pid).children() if "epsdpo.batch.warm" in " ".join(child.cmdline())
    )


def test_a_batch_goes_on_without_its_warm_process(tmp_path):
    """What runs is finished; what follows is started anew, which is said; a stage whose keeper is killed has failed."""
    kit = TinyKit(tmp_path)
    kit.write_config("eps", beta=1.5)  # seconds for each of its steps
    record = kit.folder / "runs" / "configs" / "eps" / "train" / "steps.jsonl"
    runner = kit.start("run", "configs")
    wait_until(lambda: record.exists() and record.read_text().count("\n") >= 1)
    (keeper,) = warm_process(runner).children()
    kill(keeper)
    _, err = runner.communicate(timeout=120)
    assert runner.returncode == 1 and "failed   eps/train: its process was killed" in err
    wait_until(lambda: not kit.processes(), seconds=60)

    steps = record.read_text().count("\n")
    assert steps < STEPS
    runner = kit.start("run", "configs")
    wait_until(lambda: record.read_text().count("\n") > steps)
    kill(warm_process(runner))
    out, err = runner.communicate(timeout=120)
    assert runner.returncode == 0, err
    said = "stages start anew, which takes them longer: the process kept warm for this batch is gone\n"
    assert out.count(said) == 1
    assert kit.started()["eps/train"] == 2 and kit.started()["report"] == 1
