"""A large batch with two workers, killed at random: in the end all is whole, and nothing ran in vain."""

import json
import random
import re
import time
from collections import Counter

import pytest
from kit.tiny_kit import STEPS, TinyKit, kill

EXPERIMENTS = 120
KILLS = 12


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    kit = TinyKit(tmp_path_factory.mktemp("large"))
    for number in range(EXPERIMENTS):
        kit.write_config(f"e{number:03d}", epsilon=0.001 * (number + 1))
    return kit


def victim(kit, rng):
    """A process of the batch to be killed: the runner, Snakemake, a stage or a kernel."""
    found = [process for process in kit.processes() if "python" in process.name()]
    return rng.choice(found) if found else None


def test_a_large_batch_with_random_kills_comes_out_whole(kit):
    rng = random.Random(0)
    killed, calls = 0, 0
    while True:
        calls += 1
        runner = kit.start("run", "configs", "--jobs", "2")
        next_kill = time.monotonic() + rng.uniform(10, 35)
        while runner.poll() is None:
            time.sleep(0.2)
            if killed < KILLS and time.monotonic() > next_kill:
                process = victim(kit, rng)
                if process is not None:
                    kill(process)
                    killed += 1
                next_kill = time.monotonic() + rng.uniform(10, 35)
        out, err = runner.communicate()
        if runner.returncode == 0:
            break
        assert calls <= KILLS + 1, f"{out[-2000:]}\n{err[-4000:]}"
        deadline = time.monotonic() + 60
        while kit.processes() and time.monotonic() < deadline:
            time.sleep(0.2)

    run_dir = kit.folder / "runs" / "configs"
    folders = [run_dir / f"e{number:03d}" / stage for number in range(EXPERIMENTS) for stage in ("train", "trajectory")]
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["status"] == "ok" and not (folder / "stage.json").exists()
    for folder in folders[::2]:
        rows = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, STEPS + 1))
        assert (folder / "model").is_dir()

    # Every kill takes with it at most the stages that were running, two of them; a report per finished call besides.
    extra = Counter({stage: count - 1 for stage, count in kit.started().items() if count > 1})
    assert sum(count for stage, count in extra.items() if stage != "report") <= 2 * killed
    page = (run_dir / "index.html").read_text(encoding="utf-8")
    # Each experiment's row names its two stages and the data that all of them share.
    assert len(re.findall(r'<span class="finished">finished</span>', page)) == 3 * EXPERIMENTS
    assert page.count('href="e') == 2 * EXPERIMENTS

    before = kit.started()
    code, _, err = kit.run("run", "configs", "--jobs", "2")
    assert code == 0 and kit.started() == before, err
