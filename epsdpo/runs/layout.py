"""How a run is laid out: stages and their notebooks, names of files, and what of it is finished.

It only reads, and loads neither papermill nor torch, so that commands which run nothing are quick.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from pathlib import Path

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, load_saved
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.files import read_object
from epsdpo.runs.fingerprint import KEY_LENGTH
from epsdpo.runs.manifest import MANIFEST, read_manifest

logger = logging.getLogger(__name__)

NOTEBOOKS = REPOSITORY / "notebooks"

# Stage -> notebook, in the order of a run; the last is run by hand alone.
STAGES = {
    "sample": "00_sample_pairs.ipynb",
    "prepare": "01_prepare_data.ipynb",
    "sft": "01b_sft.ipynb",
    "train": "02_train.ipynb",
    "trajectory": "03_beta_trajectory.ipynb",
    "evaluate": "04_evaluate.ipynb",
    "report": "05_report.ipynb",
    "claims": "06_claims.ipynb",
    "precision": "07_precision.ipynb",
    "compare": "03b_compare_trajectories.ipynb",
}

# Beside a stage's folder: what was made there for other settings, by other code, or by nobody knows what.
SUPERSEDED = "superseded"

# Beside the stages of an experiment: what its models and its judge answered, for every later evaluation of it.
ANSWERS = "answers"

# What the runner leaves in a stage's folder, beside what the notebook writes there.
EXECUTED = "notebook.ipynb"
PAGE = "notebook.html"

# What trainings write there: a row per step. It is `epsdpo.methods.record`'s, which loads more than commands can wait
# for.
STEPS = "steps.jsonl"
# Of a run folder: every experiment in a row.
INDEX = "index.html"

# What the evaluate notebook writes there: its numbers.
SUMMARY = "summary.json"

# Beside the experiments of a batch that tests claims: what benchmarks/step_cost.py measured.
STEP_COST = Path("step_cost") / "mini.json"

# Beside the stages of an experiment: what `epsdpo benchmark` measured of its models.
BENCHMARKS = "benchmarks"
BENCHMARK_RESULTS = "results.json"


def experiment_of(train_dir: Path) -> Experiment:
    """The experiment trained in `train_dir`, with the title that it has in its run by now."""
    for folder in (train_dir.parent, train_dir):
        if (folder / EXPERIMENT_FILE).exists():
            return load_saved(folder / EXPERIMENT_FILE)
    raise ConfigError(f"{train_dir} holds no {EXPERIMENT_FILE}; give the training folder of a run of this kit")


def link_to_index(folder: Path) -> str:
    """The relative link from a page in a stage's folder to the index of its batch; "" where it is part of none."""
    for above in folder.resolve().parents[:2]:
        if (above / INDEX).exists() and (above / ".epsdpo").is_dir():  # a page of the runner's, not of somebody's site
            return os.path.relpath(above / INDEX, folder.resolve())
    return ""


def experiments_in(run_dir: Path) -> dict[str, Experiment]:
    """The experiments of a run folder by name, also those that a later batch no longer asks for.

    A folder whose config cannot be read is none of them: what lies astray there must not stop a batch.
    """
    found = {}
    for file in sorted(run_dir.glob(f"*/{EXPERIMENT_FILE}")):
        try:
            found[file.parent.name] = load_saved(file)
        except ConfigError as error:
            _tell_once(f"passing over {error}")
    return found


@functools.cache
def _tell_once(message: str) -> None:
    logger.warning(message)


def titles_in(run_dir: Path) -> dict[str, str]:
    """Titles of the experiments of a run folder, by name."""
    return {name: experiment.title for name, experiment in experiments_in(run_dir).items()}


def not_judged(folder: Path) -> int:
    """How many comparisons of a finished evaluation have no judgement yet, its checkpoints' included; else 0."""
    summaries = [*folder.glob(SUMMARY), *folder.glob(f"checkpoint-*/{SUMMARY}")]
    return sum((read_object(path) or {}).get("n_failed", 0) for path in summaries)


def finished_analyses(run_dir: Path) -> dict[str, str]:
    """Keys of what a report shows, by "<experiment>/<stage>": finished trajectory and evaluate stages, benchmarks."""
    keys = {}
    for stage in ("trajectory", "evaluate"):
        for file in sorted(run_dir.glob(f"*/{stage}/{MANIFEST}")):
            manifest = read_manifest(file.parent)
            if manifest is not None:
                keys[f"{file.parents[1].name}/{stage}"] = manifest["key"]
    for file in sorted(run_dir.glob(f"*/{BENCHMARKS}/{BENCHMARK_RESULTS}")):
        keys[f"{file.parents[1].name}/{BENCHMARKS}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:KEY_LENGTH]
    return keys


def tested_on(run_dir: Path) -> dict[str, str]:
    """Keys of what claims are tested on: all evaluations of a run folder, and the benchmark of a step."""
    keys = {name: key for name, key in finished_analyses(run_dir).items() if name.endswith("/evaluate")}
    if (run_dir / STEP_COST).exists():
        keys["step_cost"] = hashlib.sha256((run_dir / STEP_COST).read_bytes()).hexdigest()[:KEY_LENGTH]
    return keys
