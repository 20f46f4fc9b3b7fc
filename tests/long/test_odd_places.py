"""Batches in folders of every name, and with Snakemake ended at random moments: nothing is lost, and nothing passes."""

import random
import signal
import time

import psutil
import pytest
from kit.tiny_kit import STEPS, TinyKit

NAMES = [
    "out #2",
    "{x}",
    "{}",
    "semi: colon, comma",
    "<b>&amp;",
    "a\nline",
    "-x",
    "😀",
    "[z]*",
    "it's $HOME `x` %s \\n\"q",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_a_folder_of_any_name(tmp_path, name):
    """The run folder, and the folder in which the kit lies and is called."""
    (tmp_path / name).mkdir()
    kit = TinyKit(tmp_path / name)
    kit.write_config("a_dpo", method="dpo")
    kit.write_config("b_eps")
    code, _, err = kit.run("run", "configs", f"--output={name}", "--jobs", "2")
    assert code == 0, err
    assert kit.run("status", "--verify", "--", name)[0] == 0


def test_snakemake_that_is_ended_at_random_moments(tmp_path):
    rng = random.Random(0)
    kit = TinyKit(tmp_path)
    for number in range(6):
        kit.write_config(f"e{number}", epsilon=0.001 * (number + 1), beta=1.1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        runner = kit.start("run", "configs", "--jobs", "2")
        time.sleep(rng.uniform(4, 16))
        for child in psutil.Process(runner.pid).children():
            if "epsdpo.batch.workflow" in " ".join(child.cmdline()):
                child.send_signal(number)
        _, err = runner.communicate(timeout=300)
        stages = [tmp_path / "runs" / "configs" / f"e{n}" / "train" / "manifest.json" for n in range(6)]
        done = all(path.exists() for path in [*stages, tmp_path / "runs" / "configs" / "report" / "manifest.json"])
        assert runner.returncode == (0 if done else 1), err
    code, _, err = kit.run("run", "configs", "--jobs", "2")
    assert code == 0, err
    for number in range(6):
        record = tmp_path / "runs" / "configs" / f"e{number}" / "train" / "steps.jsonl"
        assert record.read_text(encoding="utf-8").count("\n") == STEPS
