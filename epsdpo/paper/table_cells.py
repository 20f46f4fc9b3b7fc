"""A table of the paper with a folder's runs beside it: published, measured, the difference, and what was different.

Whatever has not run yet says so; the table can be made of a batch at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import ndtri

from epsdpo.evaluation.scores.intervals import Interval, prediction_interval, standard_error, t_interval
from epsdpo.evaluation.scores.score_file import ALPACA_EVAL_2
from epsdpo.experiment import Experiment
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.experiment.values import flatten, value_text
from epsdpo.methods.record import read_pairs
from epsdpo.paper.published import Printed, Published
from epsdpo.report.collect import is_trained
from epsdpo.runs.layout import SUMMARY, experiments_in
from epsdpo.runs.manifest import read_manifest
from epsdpo.trajectory.summary import summarise

MEASURED, NOT_RUN, NOT_FINISHED = "measured", "not run", "not finished"
NOT_EVALUATED, NOT_JUDGED, NO_NUMBER = "not evaluated", "not judged", "no such number"

LEVEL = 0.95
_OF_TRAINING = ("mean_step", "seconds_per_step")
_PERCENT_OF = {"percent_per_step": "seconds_per_step"}  # of the run that is taken off
_CALLED = {"model.name_or_path": "model", "data.source": "data"}
_NOTHING = Interval(math.nan, math.nan)

COLUMNS = [
    *("table", "row", "column", "metric", "prints", "digits", "published", "spread", "state", "runs"),
    *("measured", "low", "high", "difference", "prediction_low", "prediction_high", "inside", "differs", "scale"),
]


class Run(NamedTuple):
    """A run that a table may be about."""

    folder: Path
    experiment: Experiment


class _Number(NamedTuple):
    """A number of one run, with an interval over prompts or pairs where it has one."""

    value: float
    interval: Interval


def beside(table: Published, run_dir: Path) -> pd.DataFrame:
    """The cells of a table, each number that the paper prints in a row, with what the runs of a folder came to.

    Returns:
        Columns `COLUMNS`. `state` says whether a number was measured, and if not why. `low` and `high` bound the
        measured mean: Student's t over runs of other seeds or worlds, else over prompts (pairs, of a mean step).
        `prediction_low` and `prediction_high` are where one more run would come to lie; from a single run one more
        evaluation, on other prompts, which knows nothing of other trainings. `inside` is whether the published number,
        as it was rounded, lies there; None where that cannot be said. `differs` is what was not as in the paper.
    """
    known: dict[str, dict[int | None, Run]] = {}
    for name, experiment in experiments_in(run_dir).items():
        recipe, seed = recipe_and_world(name)
        known.setdefault(recipe, {})[seed] = Run(run_dir / name, experiment)
    rows = []
    for cell in table.values:
        runs = known.get(table.run_of(cell) or "", {})
        others = known.get(table.minus.get(cell.row) or "", {})
        for metric, published in cell.printed.items():
            kind, spread = table.metrics[metric], cell.spread.get(metric, math.nan)
            found = _found(table, cell, metric, runs, others)
            numbers = found if isinstance(found, list) else []
            measured, interval, predicted = _joined(numbers, spread)
            rounding = 0.5 * 10.0**-kind.digits
            inside = predicted.low - rounding <= published <= predicted.high + rounding
            rows.append(
                {
                    "table": table.title,
                    "row": cell.row,
                    "column": cell.column,
                    "metric": metric,
                    "prints": kind.prints,
                    "digits": kind.digits,
                    "published": published,
                    "spread": spread,
                    "state": MEASURED if numbers else found,
                    "runs": len(numbers),
                    "measured": measured,
                    "low": interval.low,
                    "high": interval.high,
                    "difference": measured - published,
                    "prediction_low": predicted.low,
                    "prediction_high": predicted.high,
                    "inside": None if math.isnan(predicted.low) else inside,
                    "differs": _differences(table, cell, metric, runs) if numbers else "",
                    "scale": table.scale,
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _found(
    table: Published, cell: Printed, metric: str, runs: Mapping[int | None, Run], others: Mapping[int | None, Run]
) -> list[_Number] | str:
    """The number of each run, or why there is none: of no run, or of none of them yet."""
    if table.metrics[metric].not_measured:
        return table.metrics[metric].not_measured
    if table.run_of(cell) is None:
        return table.without_run[cell.row]
    subtracts = cell.row in table.minus
    if not runs or (subtracts and not others):
        return NOT_RUN
    of_run = _PERCENT_OF.get(metric, metric)
    numbers, reasons = [], []
    for seed, run in runs.items():
        number = _number(run.folder, of_run)
        if subtracts and not isinstance(number, str):
            other = _number(others[seed].folder, of_run) if seed in others else NOT_RUN
            if isinstance(other, str):
                number = other
            else:
                less = number.value - other.value
                number = _Number(100.0 * less / other.value if metric in _PERCENT_OF else less, _NOTHING)
        (reasons if isinstance(number, str) else numbers).append(number)
    return numbers or reasons[0]


def _number(folder: Path, metric: str) -> _Number | str:
    train, evaluate = folder / "train", folder / "evaluate"
    if not is_trained(train):
        return NOT_FINISHED
    if metric in _OF_TRAINING:
        value = summarise(train)[metric]
        return (
            NO_NUMBER
            if math.isnan(value)
            else _Number(value, _over_pairs(train) if metric == "mean_step" else _NOTHING)
        )
    if read_manifest(evaluate) is None:
        return NOT_EVALUATED
    summary = json.loads((evaluate / SUMMARY).read_text(encoding="utf-8"))
    if metric not in summary:
        return NO_NUMBER if "win_rate" in summary else NOT_JUDGED
    ends = (summary.get(f"{metric}_{end}", math.nan) for end in ("low", "high"))
    return _Number(summary[metric], Interval(*ends))


def _over_pairs(train: Path) -> Interval:
    """Of the mean step: over pairs, each of which may have been met several times."""
    pairs = read_pairs(train)
    mean, half = pairs["decision"].mean(), _z() * standard_error(pairs["decision"], pairs["pair_id"].astype(str))
    return Interval(float(mean - half), float(mean + half))


def _joined(numbers: list[_Number], spread: float) -> tuple[float, Interval, Interval]:
    """Mean of the runs, its interval, and where one more run lies, or one whose own error is as published."""
    if not numbers:
        return math.nan, _NOTHING, _NOTHING
    values = [number.value for number in numbers]
    if len(values) > 1:
        mean, interval, predicted = (
            float(np.mean(values)),
            t_interval(values, LEVEL),
            prediction_interval(values, LEVEL),
        )
        reach = [mean - predicted.low, predicted.high - mean]
    else:
        (mean, interval) = numbers[0]
        # Of two evaluations each has its own error; where the paper prints none, it is taken to be as large as here.
        reach = [math.sqrt(2.0) * (mean - interval.low), math.sqrt(2.0) * (interval.high - mean)]
        if not math.isnan(spread):
            reach = [math.hypot(mean - interval.low, _z() * spread), math.hypot(interval.high - mean, _z() * spread)]
    return mean, interval, Interval(mean - reach[0], mean + reach[1])


def _z() -> float:
    return float(ndtri(0.5 + LEVEL / 2.0))


def _differences(table: Published, cell: Printed, metric: str, runs: Mapping[int | None, Run]) -> str:
    """What was not as in the paper, of what is known of it: model, data, settings, judge, how many runs."""
    settings = [flatten(run.experiment.model_dump()) for run in runs.values()]
    found = []
    for key, theirs in {**table.made_with, **cell.made_with}.items():
        ours = list(dict.fromkeys(_text(values.get(key)) for values in settings))
        if ours != [value_text(theirs)]:
            found.append(f"{_CALLED.get(key, key.rsplit('.', 1)[-1])} {', '.join(ours)}, in the paper {theirs}")
    if metric not in _OF_TRAINING and metric not in _PERCENT_OF:
        found += _judging(table, metric, runs)
    if len(runs) > 1:
        found.append(f"{len(runs)} runs, in the paper 1")
    return "; ".join(found)


def _text(value: Any) -> str:
    return "not set" if value is None else value_text(value)


def _judging(table: Published, metric: str, runs: Mapping[int | None, Run]) -> list[str]:
    found = []
    for run in runs.values():
        path = run.folder / "evaluate" / SUMMARY
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if table.judge and "win_rate" in summary and table.judge not in str(summary.get("judge")):
            found.append(f"judge {summary.get('judge')}, in the paper {table.judge}")
        if metric == "length_controlled_win_rate" and summary.get("length_control") != ALPACA_EVAL_2:
            found.append(f"length control {summary.get('length_control')}, in the paper {ALPACA_EVAL_2}")
    return list(dict.fromkeys(found))


def something_measured(cells: pd.DataFrame) -> bool:
    return bool((cells["state"] == MEASURED).any())


def in_words(cells: pd.DataFrame) -> str:
    """How many numbers of a table were measured, and where the published ones lie, in a sentence."""
    measured = cells[cells["state"] == MEASURED]
    judged = measured["inside"].dropna().astype(bool)
    if measured.empty:
        return f"None of the {len(cells)} printed numbers has been measured in this folder."
    return (
        f"{len(measured)} of the {len(cells)} printed numbers have been measured in this folder. Of {len(judged)} with "
        f"an interval of prediction, the printed number lies inside {int(judged.sum())} times, outside "
        f"{int((~judged).sum())} times."
    )


def made_differently(cells: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Each difference from the paper, with the rows that have it; all rows are an empty list."""
    measured = cells[cells["state"] == MEASURED]
    rows = list(dict.fromkeys(zip(measured["row"], measured["column"], strict=True)))
    having: dict[str, list[tuple[str, str]]] = {}
    for place, text in zip(zip(measured["row"], measured["column"], strict=True), measured["differs"], strict=True):
        for part in filter(None, text.split("; ")):
            having.setdefault(part, [])
            if place not in having[part]:
                having[part].append(place)
    return [
        (part, [] if len(places) == len(rows) else [" / ".join(filter(None, place)) for place in places])
        for part, places in having.items()
    ]
