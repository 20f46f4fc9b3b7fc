"""The runs of a batch folder, joined from what their stages wrote: one row per experiment, and where each came from."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.experiment import EXPERIMENT_FILE, Experiment
from epsdpo.methods.launches import IN_WORDS
from epsdpo.methods.record import read_criterion, read_steps
from epsdpo.runs.layout import MODEL_FOLDER, SUMMARY, experiment_of, experiments_in
from epsdpo.runs.manifest import MANIFEST, STAGE_FILE, commit_of, read_manifest
from epsdpo.trajectory.summary import summarise


@dataclass(frozen=True)
class Run:
    """One trained experiment of a batch.

    Attributes:
        directory: its folder.
        experiment: its resolved config.
        steps: its β record, one row per optimiser step.
        trajectory: `summarise` of it.
        evaluation: the numbers of its evaluate stage, or None if it has none.
    """

    directory: Path
    experiment: Experiment
    steps: pd.DataFrame
    trajectory: dict[str, float]
    evaluation: dict[str, Any] | None


def collect(batch_dir: str | Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a batch folder, baselines first, and the names of experiments that did not finish.

    Runs of several batches may share a title, by which tables and figures go: theirs then end with their names.

    Raises:
        FileNotFoundError: if no experiment of the folder was trained.
    """
    batch_dir = Path(batch_dir)
    # One experiment's own folder, as a training by hand leaves it, is a batch of one.
    alone = (batch_dir / "train" / EXPERIMENT_FILE).exists()
    experiments = {batch_dir.name: experiment_of(batch_dir / "train")} if alone else experiments_in(batch_dir)
    titles = Counter(experiment.title for experiment in experiments.values())
    runs, unfinished = [], []
    folders = [batch_dir] if alone else sorted(file.parent for file in batch_dir.glob(f"*/{EXPERIMENT_FILE}"))
    for folder in folders:
        experiment = experiments.get(folder.name)
        if experiment is None or not is_trained(folder / "train"):
            unfinished.append(folder.name)
            continue
        if titles[experiment.title] > 1:  # of batches that did not know of each other
            experiment = experiment.model_copy(update={"title": f"{experiment.title} ({experiment.name})"})
        summary = folder / "evaluate" / SUMMARY
        runs.append(
            Run(
                directory=folder,
                experiment=experiment,
                steps=read_steps(folder / "train"),
                trajectory=summarise(folder / "train"),
                evaluation=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None,
            )
        )
    if not runs:
        raise FileNotFoundError(
            f"{batch_dir} holds no trained experiment. Give the folder of `epsdpo run`, e.g. runs/demo, or run 02_train"
        )
    return sorted(runs, key=lambda run: (run.experiment.method != "dpo", run.experiment.name)), unfinished


def is_trained(train_dir: Path) -> bool:
    """Whether a stage has finished there, or a notebook by hand or a launcher, which leave no manifest."""
    by_a_stage = (train_dir / MANIFEST).exists() or (train_dir / STAGE_FILE).exists()
    return read_manifest(train_dir) is not None if by_a_stage else (train_dir / MODEL_FOLDER).is_dir()


def results_table(runs: list[Run]) -> pd.DataFrame:
    """One row per run: title, settings, β, decisions, and the evaluation's numbers with their intervals."""
    rows = []
    for run in runs:
        criterion = run.experiment.criterion()
        rows.append(
            {
                **(run.evaluation or {}),
                "title": run.experiment.title,  # by now; the evaluation has that which it was made under
                "method": run.experiment.method,
                "epsilon": criterion.get("epsilon"),
                "criterion": IN_WORDS.get(criterion.get("criterion_dtype")),
                "released_launch": IN_WORDS.get(read_criterion(run.directory / "train").get("released_launch")),
                **run.trajectory,
            }
        )
    return pd.DataFrame(rows)


def provenance(runs: list[Run]) -> pd.DataFrame:
    """What each run came from: git commit, seed, package versions, machine and time, read from its manifest."""
    return pd.DataFrame(
        [
            {"run": run.experiment.title, "seed": run.experiment.seed, **origin_of(run.directory / "train")}
            | _kept_analyses(run.directory)
            for run in runs
        ]
    ).fillna("–")


def _kept_analyses(directory: Path) -> dict[str, str]:
    """Commits of analyses that were kept though code has changed since; of a training its origin says so."""
    manifests = {stage: read_manifest(directory / stage) or {} for stage in ("trajectory", "evaluate")}
    kept = [f"{stage}: {commit_of(manifest)}" for stage, manifest in manifests.items() if "kept" in manifest]
    return {"kept results": "; ".join(kept)} if kept else {}


def quantised_weights(run: Run) -> list[str]:
    """In words, the weights of each GGUF file that a run was trained or evaluated with, as its manifests tell."""
    manifests = [read_manifest(run.directory / stage) or {} for stage in ("train", "evaluate")]
    files = {key: facts for manifest in manifests for key, facts in manifest.get("gguf", {}).items()}
    return [f"{key} is {facts['file']}, {facts['weights']}" for key, facts in files.items()]


def origin_of(train_dir: Path) -> dict[str, str]:
    """Git commit, package versions, machine and time of one training, read from its manifest."""
    manifest = read_manifest(train_dir)
    if manifest is None:
        return {"commit": "not recorded: trained by hand"}
    packages = manifest["packages"]
    return {
        "commit": commit_of(manifest) or "not in git",
        **{name: packages[name] for name in ("torch", "transformers", "trl")},
        "machine": ", ".join(manifest["gpus"]) or f"{manifest['cpus']} CPUs",
        "finished (UTC)": manifest["finished"][:16].replace("T", " "),
    }
