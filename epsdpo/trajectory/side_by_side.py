"""Runs of any origin side by side: training folders of this kit, whole batches, and TRL's logs from elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment
from epsdpo.experiment.keys import setting_of
from epsdpo.experiment.paths import resolve_path
from epsdpo.methods.record import STEPS_FILE, incompleteness, read_steps
from epsdpo.plots.looks import OTHER, family_of
from epsdpo.runs.layout import experiment_of
from epsdpo.trajectory import displacement
from epsdpo.trajectory.summary import as_windows
from epsdpo.trajectory.trl_logs import TRAINER_STATE, MissingBeta, find_log, read_log


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        title: unique in the comparison.
        family: as figures tell runs apart; of a log alone nobody knows the method.
        steps: the columns of `read_steps` and `WINDOW_COLUMNS`, a row per logged step.
        apart: what became of chosen and rejected responses, as `over_training` has it; of a log `over_steps`.
        source: where the steps were read, from the path that was given.
        left_out: in words, which rows of a log, or of a record that was begun anew, are not among them.
        recorded_in: the training's folder of a run whose experiment is known; None of any other.
    """

    title: str
    family: str
    steps: pd.DataFrame
    apart: pd.DataFrame
    source: Path
    left_out: str
    recorded_in: Path | None = None


@dataclass(frozen=True)
class _Found:
    """What lies behind a path: the training folder of a run of this kit, or else the file of a log."""

    title: str
    path: Path
    source: Path
    recorded: bool


def find_runs(
    paths: Sequence[str], titles: Sequence[str] = (), betas: Sequence[float | None] = ()
) -> list[ComparedRun]:
    """The runs behind `paths`, in their order.

    Args:
        paths: of training folders, experiment folders, batch folders, TRL output or checkpoint folders, or log files.
        titles: one for each run that is found; none for the runs' own titles, or the names of their files or folders.
        betas: one for each run that is found, the β of its configuration, for logs that do not say it (see
            `read_log`); None where a run says it.

    Raises:
        ConfigError: if nothing can be read at a path; if titles or β's are too few or too many, or titles occur twice;
            if a β is missing, is none, or is not what the run says itself.
    """
    found = [run for path in paths for run in _found_at(Path(path))]
    if not found:
        raise ConfigError("no runs to compare; name folders or logs in `runs`")
    for what, given in (("titles", titles), ("betas", betas)):
        if given and len(given) != len(found):
            own = ", ".join(run.title for run in found)
            raise ConfigError(f"{len(given)} {what} for {len(found)} runs; give one for each of: {own}")
    names = list(titles) or [run.title for run in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several runs are called {', '.join(twice)}; give each a title of its own in `titles`")
    runs = []
    for place, (name, run) in enumerate(zip(names, found, strict=True)):
        try:
            runs.append(_read(replace(run, title=name), betas[place] if betas else None))
        except MissingBeta as error:
            stated = ["null"] * len(found)
            stated[place] = "0.1"
            raise ConfigError(f"{error}: β of {name!r}, such as betas=[{', '.join(stated)}]") from None
    return runs


def _found_at(given: Path) -> list[_Found]:
    path = resolve_path(given)
    # A training folder, that of its experiment, or that of a whole batch.
    for pattern in (STEPS_FILE, f"train/{STEPS_FILE}", f"*/train/{STEPS_FILE}"):
        if files := sorted(path.glob(pattern)):
            return [
                _Found(_title_of(file.parent), file.parent, given / file.relative_to(path), recorded=True)
                for file in files
            ]
    file = find_log(path)
    if file is None:
        raise ConfigError(
            f"{path}: holds no run; give a folder with {STEPS_FILE} or {TRAINER_STATE}, a batch folder, or a log file"
        )
    title = path.stem if path.is_file() else path.name
    return [_Found(title, file, given / file.relative_to(path), recorded=False)]


def _experiment_behind(train_dir: Path) -> Experiment | None:
    """A run of the trainer may have none."""
    behind = any((folder / EXPERIMENT_FILE).exists() for folder in (train_dir.parent, train_dir))
    return experiment_of(train_dir) if behind else None


def _title_of(train_dir: Path) -> str:
    experiment = _experiment_behind(train_dir)
    return train_dir.name if experiment is None else experiment.title


def _read(run: _Found, beta: float | None) -> ComparedRun:
    """The run with its steps.

    Args:
        beta: that is stated, None where none is.
    """
    if beta is not None and (type(beta) not in (int, float) or not 0.0 < beta < float("inf")):
        raise ConfigError(f"betas: {run.title} has {beta!r}, which is no β; give a number above 0")
    if not run.recorded:
        log = read_log(run.path, beta)
        left_out = f"{log.left_out} rows without β or of no training, {log.repeated} of steps that a later row repeats"
        return ComparedRun(run.title, OTHER, log.steps, displacement.over_steps(log.steps), run.source, left_out)
    experiment, steps = _experiment_behind(run.path), read_steps(run.path)
    family, configured = OTHER, None
    if experiment is not None:
        family, configured = family_of(experiment), setting_of(experiment, "beta")
    steps = as_windows(steps, configured)
    known = steps["beta_initial"].iloc[0]
    if beta is not None and beta != known:
        raise ConfigError(f"betas: {run.title} has {beta:g}, and its own record says {known:g}; leave it out")
    apart = displacement.of_run(run.path, steps)
    return ComparedRun(
        run.title, family, steps, apart, run.source, incompleteness(run.path) or "–", experiment and run.path
    )


def sources(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    """Where each run was read, how many rows were logged, of how many steps each is a mean, and what was left out."""
    rows = []
    for run in runs:
        lengths = (run.steps["last_step"] - run.steps["first_step"] + 1).astype(int)
        per_row = str(lengths.max()) if lengths.min() == lengths.max() else f"{lengths.min()} to {lengths.max()}"
        beta = run.steps["beta_initial"].iloc[0]
        rows.append(
            {"run": run.title, "method": run.family, "read from": str(run.source), "rows": len(run.steps)}
            | {"steps per row": per_row, "β of its config": "not known" if pd.isna(beta) else f"{beta:.4g}"}
            | {"left out": run.left_out}
        )
    return pd.DataFrame(rows)
