"""What the browser tests share: the browser, and a small batch run headless in a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kit.chromium import Chromium
from kit.claim_runs import as_two_worlds
from kit.hostile import HOSTILE, HOSTILE_TITLE

from epsdpo.experiment import load_experiment

ROOT = Path(__file__).parents[2]
DEMO, STAGES = Path("configs") / "demo", Path("configs") / "stages"
TABLE_5 = Path("configs") / "paper" / "table5_two_epsilons" / "_published.yaml"  # which the pages of claims read


@dataclass(frozen=True)
class Checkout:
    """A copy of what a user works with, in which `epsdpo run configs/demo configs/stages` has been run.

    Attributes:
        folder: the copy; its demo is small, and has a second experiment with hostile texts and a hostile title.
        environment: in which its own `epsdpo` is the one that is imported, here and in kernels.
    """

    folder: Path
    environment: dict[str, str]

    @property
    def demo(self) -> Path:
        """The experiment that the notebooks' defaults name, as run headless."""
        return self.folder / "runs" / "demo" / "epsilon_dpo_fp32"

    @property
    def claimed(self) -> Path:
        """The batch that the defaults of 06 and 07 name."""
        return self.folder / "runs" / "paper-mini"

    @property
    def real(self) -> Path:
        """The batch that the defaults of 08 name."""
        return self.folder / "runs" / "real-mini"

    @property
    def hostile(self) -> Path:
        return self.folder / "runs" / "demo" / "hostile"

    def data_of(self, experiment: Path) -> Path:
        """The prepared data of an experiment of the batch."""
        manifest = json.loads((experiment / "train" / "manifest.json").read_text(encoding="utf-8"))
        return self.folder / manifest["parameters"]["data_dir"]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.quit()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, official):
    """A `Checkout`. Takes about three minutes on two cores, and another where the world's model has to be built."""
    folder = tmp_path_factory.mktemp("checkout")
    for name, besides in {"epsdpo": [], "notebooks": ["runs"]}.items():
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*", *besides))
    # The report by hand shows what 02 and 04 made by hand; here it is to be compared with that of the batch.
    report = folder / "notebooks" / "05_report.ipynb"
    report.write_text(
        report.read_text(encoding="utf-8").replace('run_dir: str = \\"\\"', 'run_dir: str = \\"runs/demo\\"')
    )
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / TABLE_5).parent.mkdir(parents=True)
    shutil.copy(ROOT / TABLE_5, folder / TABLE_5)
    for config in (DEMO / "epsilon_dpo_fp32.yaml", STAGES / "world_on_policy.yaml", STAGES / "world_sft.yaml"):
        write_small(config, folder)
    write_hostile_experiment(folder / DEMO / "hostile.yaml", official)
    # CPU arithmetic depends on the number of threads in its last bits, and runs are compared to the last bit.
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    # Who builds the world says so, and the notebooks that are compared shall not: it is built before them.
    build = [sys.executable, "-m", "epsdpo", "stage", "prepare", "--output", str(tmp_path_factory.mktemp("built"))]
    build += ["--parameter", f"config={DEMO / 'epsilon_dpo_fp32.yaml'}"]
    subprocess.run(build, cwd=folder, env=environment, check=True, timeout=300)
    batch = [sys.executable, "-m", "epsdpo", "run", str(DEMO), str(STAGES), "--output", "runs/demo"]
    subprocess.run(batch, cwd=folder, env=environment, check=True, timeout=900)
    comparison = [sys.executable, "-m", "epsdpo", "stage", "compare", "--output", "runs/compare"]
    subprocess.run(comparison, cwd=folder, env=environment, check=True, timeout=300)
    # What the defaults of 06 and 07 name, which takes more than an hour to run: here, runs of the demo stand for it.
    claimed = Path("runs") / "paper-mini"
    as_two_worlds(folder / "runs" / "demo", {"epsilon_dpo_fp32": "eps"}, folder / claimed)
    shutil.copytree(official.parent / "regimes", folder / "tests" / "data" / "regimes")
    for stage in ("claims", "precision"):
        last = [sys.executable, "-m", "epsdpo", "stage", stage, "--output", str(claimed / stage)]
        last += ["--parameter", f"run_dir={claimed}"]
        subprocess.run(last, cwd=folder, env=environment, check=True, timeout=300)
    # So it does for what the default of 08 names.
    real = Path("runs") / "real-mini"
    made = Checkout(folder, environment)
    shutil.copytree(made.demo, folder / real / made.demo.name)
    shutil.copytree(made.data_of(made.demo), folder / real / made.data_of(made.demo).name)
    last = [sys.executable, "-m", "epsdpo", "stage", "real_text", "--output", str(real / "real_text")]
    subprocess.run([*last, "--parameter", f"run_dir={real}"], cwd=folder, env=environment, check=True, timeout=300)
    return made


def write_small(config: Path, folder: Path) -> None:
    """An experiment of the notebooks' defaults, on 64 pairs and 16 prompts: 4 steps."""
    values = load_experiment(ROOT / config).model_dump()
    values["data"]["world"] |= {"train_pairs": 64, "eval_pairs": 16, "prompts": 16}
    values["train"] |= {"global_batch_size": 16, "per_device_train_batch_size": 16}
    values["evaluate"]["bootstrap_samples"] = 100
    if values["data"]["on_policy"] is not None:
        values["data"]["on_policy"]["prompts"]["max_prompts"] = 16
    if values["model"]["sft"] is not None:
        values["model"]["sft"] |= {"global_batch_size": 16, "per_device_train_batch_size": 16, "logging_steps": 1}
    (folder / config).parent.mkdir(parents=True, exist_ok=True)
    (folder / config).write_text(yaml.safe_dump(values), encoding="utf-8")


def write_hostile_experiment(path: Path, official: Path) -> None:
    """Two steps of the tiny reference model on pairs that are nothing but hostile text, under a hostile title."""
    model = path.parents[2] / "model"
    model.mkdir()
    for source in (*(official / "policy").iterdir(), *(official / "tok").iterdir()):
        shutil.copy(source, model)
    pairs = path.parents[2] / "pairs.jsonl"
    rows = [{"prompt": HOSTILE, "chosen": f" {number} {HOSTILE}", "rejected": HOSTILE} for number in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "title": HOSTILE_TITLE,
        "method": "epsilon_dpo",
        "data": {"source": str(pairs)},
        "model": {"name_or_path": str(model)},
        "train": {
            "beta": 0.1,
            "num_train_epochs": 1,
            "global_batch_size": 4,
            "per_device_train_batch_size": 4,
            "max_length": 1024,
            "bf16": False,
            "activation_checkpointing": False,
            "logging_steps": 1,
            "use_cpu": True,
        },
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
