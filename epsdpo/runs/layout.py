"""How a run is laid out: names of its folders and files, and what of it is finished.

Nothing is written here, and neither papermill nor torch loaded, so that commands which run nothing are quick.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, load_saved
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.files import read_object
from epsdpo.runs.decisive import of_prepared_data, of_sampling, of_sft
from epsdpo.runs.manifest import MANIFEST, kept_by, read_manifest
from epsdpo.runs.reach import digest

logger = logging.getLogger(__name__)

NOTEBOOKS = REPOSITORY / "notebooks"

# Beside a stage's folder: what was made there for other settings, by other code, or by nobody knows what.
SUPERSEDED = "superseded"

# What was paid for or took long lies beside the stage's folder, which makes way when it is outdated: what models and
# judge answered, also to sampling, and up to which ε the decisions of pairs hold.
ANSWERS = "answers"
BOUNDS = "bounds"

# Of a run folder: what was foretold and measured of the criterion on real text, by all that decides it.
REAL_TEXT = "decisions"

# What the runner leaves in a stage's folder, beside what the notebook writes there.
EXECUTED = "notebook.ipynb"
PAGE = "notebook.html"

# What trainings write there, a row per step: as the record calls it, which loads more than commands can wait for.
STEPS = "steps.jsonl"

# Of a run folder: every experiment in a row, and what the runner keeps for itself.
INDEX = "index.html"
STATE_FOLDER = ".epsdpo"

# What the evaluate notebook writes there: its numbers, all responses, and their judgements in AlpacaEval's format.
SUMMARY = "summary.json"
RESPONSES = "responses.parquet"
ANNOTATIONS = "annotations.json"

# What the report notebook writes there: of each experiment, whether it is the published run.
VERDICTS = "verdicts.json"

# In a training's folder, once it is finished: the weights.
MODEL_FOLDER = "model"

# Beside the experiments of a batch that tests claims: what benchmarks/step_cost.py measured.
STEP_COST = Path("step_cost") / "mini.json"

# Beside the stages of an experiment: what `epsdpo benchmark` measured of its models.
BENCHMARKS = "benchmarks"
BENCHMARK_RESULTS = "results.json"


def pairs_folder(experiment: Experiment) -> str:
    """Name of the folder of sampled pairs: experiments whose pairs would come out the same share one."""
    return _shared_folder("pairs", of_sampling(experiment))


def data_folder(experiment: Experiment) -> str:
    """Name of the prepared-data folder, shared as that of pairs."""
    return _shared_folder("data", of_prepared_data(experiment))


def sft_folder(experiment: Experiment) -> str:
    """Name of the SFT model's folder, shared as that of pairs."""
    return _shared_folder("sft", of_sft(experiment))


def _shared_folder(kind: str, settings: dict[str, Any]) -> str:
    return f"{kind}-{digest(json.dumps(settings, sort_keys=True))[:8]}"


def shared_folders(experiment: Experiment) -> dict[str, str]:
    """Stage -> folder in the run, of the stages that an experiment may share with others."""
    pairs = {"sample": pairs_folder(experiment)} if experiment.data.on_policy else {}
    sft = {"sft": sft_folder(experiment)} if experiment.model.sft else {}
    return {**pairs, "prepare": data_folder(experiment), **sft}


def experiment_of(train_dir: Path) -> Experiment:
    """The experiment trained in `train_dir`, with the title that it has in its run by now."""
    for folder in (train_dir.parent, train_dir):
        if (folder / EXPERIMENT_FILE).exists():
            return load_saved(folder / EXPERIMENT_FILE)
    raise ConfigError(f"{train_dir} holds no {EXPERIMENT_FILE}; give the training folder of a run of this kit")


def prepared_of(train_dir: Path) -> Path | None:
    """The training pairs of a run that a batch trained, beside its experiment; None where they are not there."""
    data_dir = (read_manifest(train_dir) or {}).get("parameters", {}).get("data_dir")
    path = train_dir.resolve().parents[1] / Path(data_dir).name / "train.parquet" if data_dir else None
    return path if path is not None and path.is_file() else None


def link_to_index(folder: Path) -> str:
    """The relative link from a page in a stage's folder to the index of its batch; "" where it is part of none."""
    for above in folder.resolve().parents[:2]:
        if (above / INDEX).exists() and (above / STATE_FOLDER).is_dir():  # the runner's page, and no site's
            return os.path.relpath(above / INDEX, folder.resolve())
    return ""


def link_to(path: Path, page_dir: str | Path) -> str:
    """The relative link to a file from a page in `page_dir`, quoted as an address, not yet escaped for HTML."""
    return urllib.parse.quote(os.path.relpath(path.resolve(), Path(page_dir).resolve()))


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


def stages_below(folder: Path) -> Iterator[Path]:
    """Folders that hold a manifest: this one, those of a batch or an experiment; not what was superseded."""
    for depth in ("", "*/", "*/*/"):
        for manifest in sorted(folder.glob(depth + MANIFEST)):
            if SUPERSEDED not in manifest.relative_to(folder).parts:
                yield manifest.parent


def kept_in(run_dir: Path) -> dict[str, str]:
    """What was kept in a run folder though code has changed since: the commit that kept it, by "<folder>/<stage>".

    Without pages that join the whole run: they say what was kept, and are made anew for that.
    """
    found = {}
    for folder in stages_below(run_dir):
        manifest = read_manifest(folder) or {}
        whose = folder if folder.parent == run_dir else folder.parent
        if "kept" in manifest and whose.name != manifest["stage"]:
            found[f"{whose.name}/{manifest['stage']}"] = kept_by(manifest)
    return found


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
        keys[f"{file.parents[1].name}/{BENCHMARKS}"] = digest(file.read_bytes())
    return keys


def trained_in(run_dir: Path) -> dict[str, str]:
    """Keys of the trainings of a run folder, by "<experiment>/train", and of what a report shows."""
    manifests = {file.parents[1].name: read_manifest(file.parent) for file in run_dir.glob(f"*/train/{MANIFEST}")}
    trained = {f"{name}/train": manifest["key"] for name, manifest in sorted(manifests.items()) if manifest is not None}
    return trained | finished_analyses(run_dir)


def tested_on(run_dir: Path) -> dict[str, str]:
    """Keys of what claims are tested on: all evaluations of a run folder, and the benchmark of a step."""
    keys = {name: key for name, key in finished_analyses(run_dir).items() if name.endswith("/evaluate")}
    if (run_dir / STEP_COST).exists():
        keys["step_cost"] = digest((run_dir / STEP_COST).read_bytes())
    return keys
