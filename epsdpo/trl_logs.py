"""Logs of training runs made without this kit, read as the steps of a β record.

What TRL and trackers logged is known here: `trainer_state.json` of a run or a checkpoint, and tables of logged rows as
CSV, JSON or JSONL, such as exports of Weights & Biases. Columns may stand under `train/`, or behind a run's name as in
"my-run - train/kl/beta". The released ε-DPO code logs `kl/beta`, β before the update, and the shares of β⁻ and β⁺ as
`kl/p_epsilon_steps` and `kl/n_epsilon_steps`. With `logging_steps` above 1 each row is a mean over its steps.
"""

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.experiment import ConfigError
from epsdpo.files import read_text
from epsdpo.record import STEP_COLUMNS

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
}
_RUN_NAMES = ("run", "run_name", "run name", "run_id", "name")  # columns that tell stacked runs apart
_APART = "Give a file for each run, named after it, and all of them in `runs`"
_NOT_NUMBERS = ("", "nan", "null", "none")  # what exports write for a value that was not logged


@dataclass(frozen=True)
class TrlLog:
    """One log.

    Attributes:
        steps: the columns of `record.read_steps`, a row per logged step in order; NaN for what was not logged.
            `beta_after` is the β of the next step, where that was logged too.
        without_beta: rows that were left out because they hold no β, such as those of evaluations.
        repeated: rows that were left out because a later row is of the same step, as after a resume.
    """

    steps: pd.DataFrame
    without_beta: int
    repeated: int


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


def read_log(path: Path) -> TrlLog:
    """Read a `trainer_state.json`, or a CSV, JSON or JSONL file of logged rows.

    Raises:
        ConfigError: naming file and line, if it is none of these, no row holds β, or a value is no number.
    """
    found = [(place, _short_names(row, path)) for place, row in _rows(path)]
    names = set().union(*(row for _, row in found))
    for needed in ("beta_before", "step"):
        if not names & set(_NAMES[needed]):
            have = ", ".join(sorted(names)) or "none"
            raise ConfigError(
                f"{path}: no column holds {'β' if needed == 'beta_before' else 'the optimiser step'}; looked for "
                f"{' or '.join(_NAMES[needed])}, also under train/, and found {have}. Log it, or export it too"
            )
    columns = {column: next((name for name in _NAMES[column] if name in names), None) for column in _NAMES}
    kept: dict[int, dict[str, float]] = {}
    runs: dict[str, None] = {}
    without_beta = with_beta = 0
    for place, row in found:
        values = {column: _number(row.get(name), place, name) for column, name in columns.items()}
        if math.isnan(values["beta_before"]):
            without_beta += 1
            continue
        with_beta += 1
        step = values.pop("step")
        if not step.is_integer():  # NaN is none either
            raise ConfigError(f"{place}: β was logged without a whole optimiser step ({columns['step']} is {step})")
        if kept and _starts_over(int(step), list(kept)):
            raise ConfigError(
                f"{place}: {columns['step']} falls back to {step:g}, where the log began (at {next(iter(kept))}): "
                f"several runs in one file. {_APART}"
            )
        kept[int(step)] = values
        runs |= dict.fromkeys(str(row[name]) for name in _RUN_NAMES if row.get(name) not in (None, ""))
        if len(runs) > 1:
            raise ConfigError(f"{place}: the rows are of several runs, {' and '.join(map(repr, runs))}. {_APART}")
    if not kept:
        raise ConfigError(f"{path}: no row holds a value of {columns['beta_before']}; give the log of a training run")
    return TrlLog(_as_record(kept), without_beta, repeated=with_beta - len(kept))


def _starts_over(step: int, before: list[int]) -> bool:
    """Whether a log that was at the steps `before` begins anew at `step`, which a run that is resumed does not."""
    first, last = before[0], before[-1]
    return step != last and (step == first or step < first < max(before))


def _as_record(rows: dict[int, dict[str, float]]) -> pd.DataFrame:
    steps = pd.DataFrame([{"step": step, **rows[step]} for step in sorted(rows)])
    next_one = steps["step"].shift(-1) == steps["step"] + 1
    steps["beta_after"] = steps["beta_before"].shift(-1).where(next_one)
    steps["tied"] = 1.0 - steps["relaxed"] - steps["tightened"]
    steps["mean_step"] = steps["mean_step"].fillna(steps["relaxed"] - steps["tightened"])
    return steps.reindex(columns=list(STEP_COLUMNS)).astype({name: float for name in STEP_COLUMNS if name != "step"})


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each logged row with the place that an error should name."""
    if path.suffix not in (".csv", ".json", ".jsonl"):
        raise ConfigError(f"{path}: is no log that is known here; give a {TRAINER_STATE}, .csv, .json or .jsonl")
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as UTF-8 or UTF-16 text: {error}; export it again") from error
    match path.suffix:
        case ".csv":
            reader = csv.DictReader(io.StringIO(text))
            for row in reader:
                yield f"{path}, line {reader.line_num}", {name: value for name, value in row.items() if name}
        case ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield _checked(f"{path}, line {number}", _parsed(line, f"{path}, line {number}"))
        case ".json":
            content = _parsed(text, str(path))
            rows = content.get("log_history") if isinstance(content, dict) else content
            if not isinstance(rows, list):
                raise ConfigError(f"{path}: holds neither log_history nor a list of rows; give a {TRAINER_STATE}")
            for number, row in enumerate(rows, start=1):
                yield _checked(f"{path}, row {number}", row)


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
