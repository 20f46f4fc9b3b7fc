"""Logs of training runs made without this kit, read as the steps of a β record.

TRL and trackers leave `trainer_state.json` of a run or a checkpoint, and tables of logged rows as
CSV, JSON or JSONL, such as exports of Weights & Biases. Columns may stand under `train/`, or behind a run's name as in
"my-run - train/kl/beta". The released ε-DPO code logs `kl/beta`, β before the update, and the shares of β⁻ and β⁺ as
`kl/p_epsilon_steps` and `kl/n_epsilon_steps`.

With `logging_steps` above 1 whatever a row holds is a mean over the steps since the row before, β included. So a row is
placed at the middle of its steps, and the β that the run began with is that of its configuration, not the first mean.

Rewards are β (log π - log π_ref): divided by the row's β they are the mean log-ratios of chosen and rejected responses,
to the digits of the log where all pairs of the row have one β, else to about ε times their mean size. Those of CPO,
SimPO and ORPO are β log π, and no log-ratios; `logps/*` tell them apart.
"""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.experiment import ConfigError
from epsdpo.files import read_text
from epsdpo.methods.record import STEP_COLUMNS
from epsdpo.trajectory.summary import WINDOW_COLUMNS

TRAINER_STATE = "trainer_state.json"

# Column of the record -> what it is called in logs, the first that is there.
_NAMES = {
    "step": ("global_step", "step", "_step"),
    "beta_before": ("kl/beta", "beta"),
    "epoch": ("epoch",),
    "relaxed": ("kl/p_epsilon_steps",),
    "tightened": ("kl/n_epsilon_steps",),
    "mean_step": ("kl/avg_steps",),
    "loss": ("loss",),
    "reward_margin": ("rewards/margins",),
    "reward_accuracy": ("rewards/accuracies",),
    "chosen_reward": ("rewards/chosen",),
    "rejected_reward": ("rewards/rejected",),
    "chosen_logps": ("logps/chosen",),
    "rejected_logps": ("logps/rejected",),
}
_PLACES = ("step", "epoch")  # when something was logged; all else is what was
_RUN_NAMES = ("run", "run_name", "run name", "run_id", "name")  # columns that tell stacked runs apart
_APART = "Give a file for each run, named after it, and all of them in `runs`"
_NOT_NUMBERS = ("", "nan", "null", "none")  # what exports write for a value that was not logged
_ROUNDING = 1e-4  # relative; logs and exports keep few digits
_DIGITS = 1e-2  # relative; what several rounded numbers of a log and a β that moves within a row leave


class MissingBeta(ConfigError):
    """A log without β."""


@dataclass(frozen=True)
class TrlLog:
    """One log.

    Attributes:
        steps: the columns of `read_steps` and of `WINDOW_COLUMNS`, a row per logged one in order; NaN
            for what was not logged. All values are means over the optimiser steps from `first_step` to `last_step`;
            `step` and `epoch` are at their middle. `beta_after` is β after `last_step`, where the next row shows it.
            The first row after a resume may be a mean over fewer steps than that: what was not logged before the kill
            is in no log.
        left_out: rows that hold no β, such as those of evaluations; without any logged β, those that hold nothing else.
        repeated: rows that were left out because a later row is of the same step, as after a resume.
    """

    steps: pd.DataFrame
    left_out: int
    repeated: int


@dataclass(frozen=True)
class _Source:
    """Rows of a log, each with the place that an error should name, and what a `trainer_state.json` says beside them.

    Attributes:
        whole: whether its rows are known to begin with the run.
        done: how many optimiser steps had been made; 0 where it does not say.
        beta: of the run's configuration, as this kit's trainers leave it there; None where it does not say.
    """

    rows: list[tuple[str, dict[str, Any]]]
    whole: bool = False
    done: int = 0
    beta: float | None = None


def find_log(path: Path) -> Path | None:
    """The log at `path`: a file itself, or a folder's `trainer_state.json`, else its latest checkpoint's; else None."""
    if path.is_file():
        return path
    if (path / TRAINER_STATE).is_file():
        return path / TRAINER_STATE

    def number(state: Path) -> int:
        suffix = state.parent.name.rpartition("-")[2]
        return (
            int(suffix) if suffix.isdecimal() else -1
        )  # others, such as checkpoint-best, only where there is no number

    return max(sorted(path.glob(f"checkpoint-*/{TRAINER_STATE}")), key=number, default=None)


def read_log(path: Path, beta: float | None = None) -> TrlLog:
    """Read a `trainer_state.json`, or a CSV, JSON or JSONL file of logged rows.

    Args:
        beta: of the run's configuration, where its log does not say it. A log without any β is taken to have kept it,
            as DPO does.

    Raises:
        ConfigError: naming file and line, if it is none of these, no row holds β and none is given, a value is no
            number, or `beta` is not what the log says.
    """
    source = _read(path)
    found = [(place, _short_names(row, path)) for place, row in source.rows]
    names = set().union(*(row for _, row in found))
    columns = {column: next((name for name in _NAMES[column] if name in names), None) for column in _NAMES}
    have = ", ".join(sorted(names)) or "none"
    if columns["beta_before"] is None and beta is None:
        raise MissingBeta(
            f"{path}: no column holds β; looked for {' or '.join(_NAMES['beta_before'])}, also under train/, and found "
            f"{have}. Log it, or export it too; or, if the run kept its β, state it"
        )
    if columns["step"] is None:
        raise ConfigError(
            f"{path}: no column holds the optimiser step; looked for {' or '.join(_NAMES['step'])}, also under train/, "
            f"and found {have}. Log it, or export it too"
        )
    rows = [
        (place, {column: _number(row.get(name), place, name) for column, name in columns.items()})
        for place, row in found
    ]
    kept_beta = beta is not None and all(math.isnan(values["beta_before"]) for _, values in rows)
    telling = [column for column in _NAMES if column not in _PLACES] if kept_beta else ["beta_before"]
    kept: dict[int, dict[str, float]] = {}
    runs: dict[str, None] = {}
    training = 0
    for (place, values), (_, row) in zip(rows, found, strict=True):
        if all(math.isnan(values[column]) for column in telling):
            continue
        training += 1
        step = values["step"]
        if not step.is_integer():  # NaN is none either
            what = "a row" if kept_beta else "β"
            raise ConfigError(
                f"{place}: {what} was logged without a whole optimiser step ({columns['step']} is {step})"
            )
        if kept and _starts_over(int(step), list(kept)):
            raise ConfigError(
                f"{place}: {columns['step']} falls back to {step:g}, where the log began (at {next(iter(kept))}): "
                f"several runs in one file. {_APART}"
            )
        kept[int(step)] = values
        runs |= dict.fromkeys(str(row[name]) for name in _RUN_NAMES if row.get(name) not in (None, ""))
        if len(runs) > 1:
            raise ConfigError(f"{place}: the rows are of several runs, {' and '.join(map(repr, runs))}. {_APART}")
    if not kept and kept_beta:
        raise ConfigError(f"{path}: no row holds a loss, or what else is logged in training; give the log of a run")
    if not kept:
        raise MissingBeta(
            f"{path}: no row holds a value of {columns['beta_before']}; give the log of a training run, or, if it kept "
            "its β, state it"
        )
    done = max(source.done, *(int(values["step"]) for _, values in rows if values["step"].is_integer()))
    steps = _placed(kept, source.whole, done)
    if kept_beta:
        steps["beta_before"] = steps["beta_after"] = beta
    steps["beta_initial"] = _beta_at_start(steps, source.beta, beta, path)
    for side in ("chosen", "rejected"):
        steps[f"{side}_log_ratio"] = _log_ratio(steps[f"{side}_reward"], steps["beta_before"], steps[f"{side}_logps"])
    steps = steps.reindex(columns=[*STEP_COLUMNS, *WINDOW_COLUMNS]).astype(dict.fromkeys(STEP_COLUMNS, float))
    return TrlLog(steps, left_out=len(rows) - training, repeated=training - len(kept))


def _placed(rows: dict[int, dict[str, float]], whole: bool, done: int) -> pd.DataFrame:
    """The rows in order, at the middle of the steps that they are means over."""
    ends = np.array(sorted(rows))
    before = np.r_[min(0, ends[0] - 1), ends[:-1]]
    if not whole and len(ends) > 1:
        # A table that begins in the middle of a run does not begin with a row of all the steps before.
        before[0] = max(before[0], ends[0] - np.diff(ends).max())
    steps = pd.DataFrame([rows[end] for end in ends])
    steps = steps.assign(step=(before + 1 + ends) / 2, first_step=before + 1, last_step=ends, total_steps=done)
    logged = steps["epoch"].notna()
    if logged.any():  # of the end of a row's steps, like the number of its step
        steps["epoch"] = np.interp(steps["step"], np.r_[0, ends[logged]], np.r_[0.0, steps["epoch"][logged]])
    next_one = steps["first_step"].shift(-1) == steps["last_step"].shift(-1)  # a mean over one step is its value
    steps["beta_after"] = steps["beta_before"].shift(-1).where(next_one)
    steps["tied"] = 1.0 - steps["relaxed"] - steps["tightened"]
    steps["mean_step"] = steps["mean_step"].fillna(steps["relaxed"] - steps["tightened"])
    return steps


def _log_ratio(reward: pd.Series, beta: pd.Series, logps: pd.Series) -> pd.Series:
    """log π - log π_ref from the rewards of a log; NaN of a method whose rewards are those of the policy alone."""
    log_ratio = reward / beta
    both = log_ratio.notna() & logps.notna()
    alone = both.any() and np.allclose(log_ratio[both], logps[both], rtol=_DIGITS)
    return log_ratio * math.nan if alone else log_ratio


def _beta_at_start(steps: pd.DataFrame, configured: float | None, stated: float | None, path: Path) -> float:
    """The β of a run's configuration; NaN where neither its log nor the caller says it."""
    logged = steps["beta_before"]
    if configured is None and len(steps) > 1 and logged.max() - logged.min() <= 1e-9 * logged.min():
        configured = logged.iloc[0]  # it never moved
    if configured is not None and stated is not None and abs(stated - configured) > _ROUNDING * configured:
        raise ConfigError(f"{path}: its β is stated as {stated:g}, and its log says {configured:g}; leave it out")
    if configured is not None or stated is not None:
        return configured if stated is None else stated
    return logged.iloc[0] if steps["last_step"].iloc[0] == 1 else math.nan


def _starts_over(step: int, before: list[int]) -> bool:
    """Whether a log that was at the steps `before` begins anew at `step`, which a run that is resumed does not."""
    first, last = before[0], before[-1]
    return step != last and (step == first or step < first < max(before))


def _read(path: Path) -> _Source:
    if path.suffix not in (".csv", ".json", ".jsonl"):
        raise ConfigError(f"{path}: is no log that is known here; give a {TRAINER_STATE}, .csv, .json or .jsonl")
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as UTF-8 or UTF-16 text: {error}; export it again") from error
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        named = ({name: value for name, value in row.items() if name} for row in reader)
        return _Source([(f"{path}, line {reader.line_num}", row) for row in named])
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), start=1)
        places = ((f"{path}, line {number}", line) for number, line in lines if line.strip())
        return _Source([_checked(place, _parsed(line, place)) for place, line in places])
    content = _parsed(text, str(path))
    state = content if isinstance(content, dict) else {"log_history": content}
    rows = state.get("log_history")
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: holds neither log_history nor a list of rows; give a {TRAINER_STATE}")
    rows = [_checked(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]
    return _Source(rows, state is content, state.get("global_step", 0), _configured_beta(state))


def _configured_beta(state: dict[str, Any]) -> float | None:
    """β of the configuration, which this kit's trainers leave in a `trainer_state.json`; None from other trainers."""
    for callback in (state.get("stateful_callbacks") or {}).values():
        settings = callback.get("attributes", {}).get("settings") if isinstance(callback, dict) else None
        if settings is not None:
            return settings["beta"]
    return None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "if its writer was killed, delete the line that it left half written"
        raise ConfigError(f"{place}: is no JSON ({error}); {remedy}") from None


def _checked(place: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: is {type(row).__name__}, and not a row of names and values")
    return place, row


def _short_names(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """The row under TRL's own names: without run, `train/` and capitals; the bands of an export are left out."""
    short: dict[str, Any] = {}
    for name, value in row.items():
        plain = name.rpartition(" - ")[2].strip().lower().removeprefix("train/")
        if plain.endswith(("__min", "__max")):
            continue
        if plain in short and plain in _NAMES["beta_before"]:
            raise ConfigError(f"{path}: has β of several runs ({name!r} is the second); give a file for each run")
        short.setdefault(plain, value)
    return short


def _number(value: Any, place: str, name: str | None) -> float:
    """A logged value as a number; NaN where nothing was logged."""
    if value is None or (isinstance(value, str) and value.strip().lower() in _NOT_NUMBERS):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{place}: {name} is {value!r}, which is no number; correct it or delete the row") from None
