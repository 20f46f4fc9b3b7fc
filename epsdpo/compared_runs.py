"""Runs of any origin side by side: training folders of this kit, whole batches, and TRL's logs from elsewhere.

It finds what lies behind a list of paths. Reading belongs to `epsdpo.record` and `epsdpo.trl_logs`, drawing to
`epsdpo.plots`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError
from epsdpo.paths import resolve_path
from epsdpo.plots.runs import OTHER, family_of
from epsdpo.record import STEPS_FILE, incompleteness, read_steps
from epsdpo.run_folder import experiment_of
from epsdpo.trl_logs import TRAINER_STATE, find_log, read_log


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        title: unique in the comparison.
        family: of `plots.runs.FAMILIES`; of a log alone nobody knows the method.
        steps: the columns of `record.read_steps`, a row per logged step.
        source: where the steps were read, from the path that was given.
        left_out: in words, which rows of a log, or of a record that was begun anew, are not among them.
    """

    title: str
    family: str
    steps: pd.DataFrame
    source: Path
    left_out: str


def find_runs(paths: Sequence[str], titles: Sequence[str] = ()) -> list[ComparedRun]:
    """The runs behind `paths`, in their order.

    Args:
        paths: of training folders, experiment folders, batch folders, TRL output or checkpoint folders, or log files.
        titles: one for each run that is found; none for the runs' own titles, or the names of their files or folders.

    Raises:
        ConfigError: if nothing can be read at a path, or titles are too few or too many, or occur twice.
    """
    runs = [run for path in paths for run in _runs_at(Path(path))]
    if not runs:
        raise ConfigError("no runs to compare; name folders or logs in `runs`")
    if titles and len(titles) != len(runs):
        found = ", ".join(run.title for run in runs)
        raise ConfigError(f"{len(titles)} titles for {len(runs)} runs; give one for each of: {found}")
    names = list(titles) or [run.title for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several runs are called {', '.join(twice)}; give each a title of its own in `titles`")
    return [
        ComparedRun(name, run.family, run.steps, run.source, run.left_out)
        for name, run in zip(names, runs, strict=True)
    ]


def _runs_at(given: Path) -> list[ComparedRun]:
    path = resolve_path(given)
    # A training folder, that of its experiment, or that of a whole batch.
    for pattern in (STEPS_FILE, f"train/{STEPS_FILE}", f"*/train/{STEPS_FILE}"):
        if files := sorted(path.glob(pattern)):
            return [_of_this_kit(file.parent, given / file.relative_to(path)) for file in files]
    file = find_log(path)
    if file is None:
        raise ConfigError(
            f"{path}: holds no run; give a folder with {STEPS_FILE} or {TRAINER_STATE}, a batch folder, or a log file"
        )
    log = read_log(file)
    left_out = f"{log.without_beta} rows without β, {log.repeated} of steps that a later row repeats"
    title = path.stem if path.is_file() else path.name
    return [ComparedRun(title, OTHER, log.steps, given / file.relative_to(path), left_out)]


def _of_this_kit(train_dir: Path, source: Path) -> ComparedRun:
    """A run of the trainer with or without an experiment behind it."""
    title, family = train_dir.name, OTHER
    if any((folder / EXPERIMENT_FILE).exists() for folder in (train_dir.parent, train_dir)):
        experiment = experiment_of(train_dir)
        title, family = experiment.title, family_of(experiment)
    return ComparedRun(title, family, read_steps(train_dir), source, incompleteness(train_dir) or "–")


def sources(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Where each run was read, how many steps were logged, and what was left out."""
    return pd.DataFrame(
        [
            {"run": run.title, "method": run.family, "read from": str(run.source), "rows": len(run.steps)}
            | {"left out": run.left_out}
            for run in runs
        ]
    )
