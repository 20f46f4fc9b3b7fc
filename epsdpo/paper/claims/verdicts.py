"""From effects to verdicts: an interval over worlds, and whether it lies in the claimed range.

One rule for all claims, stated before the runs: a claim holds if the whole interval lies in its range, does not hold
if none of it does, and otherwise cannot be told with these runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.intervals import t_interval
from epsdpo.paper.claims.effects import effects_of
from epsdpo.paper.claims.names import AT_LARGEST, MEASURES
from epsdpo.paper.claims.settings import Claim, Claims

HOLDS, DOES_NOT_HOLD, CANNOT_BE_TOLD = "holds", "does not hold", "cannot be told"
VERDICTS = (HOLDS, DOES_NOT_HOLD, CANNOT_BE_TOLD)


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        effects: one per world (per round of the benchmark, for the time of a step), in the unit of the measure.
        effect, low, high: their mean and its interval, Student's t over worlds; NaN with fewer than two.
        why: what is missing, if too few worlds have all runs; else "".
        at_largest: of a bound of ε, the share of pairs that hold up to `largest`, the largest ε tried, and count with
            it; NaN of everything else. Above 0, `effect` is a lower limit, or neither limit if it is a difference.
    """

    claim: Claim
    effects: pd.Series
    effect: float
    low: float
    high: float
    verdict: str
    why: str = ""
    at_largest: float = np.nan
    largest: float = np.nan

    @property
    def is_lower_limit(self) -> bool:
        return self.at_largest > 0.0 and not self.claim.is_difference


def verdict_on(claim: Claim, claims: Claims, measures: pd.DataFrame, rounds: pd.DataFrame) -> Verdict:
    """Test one claim on the measures of all runs, or on the rounds of the benchmark."""
    effects = effects_of(claim, measures, rounds)
    effect = low = high = float("nan")
    if len(effects) > 1:
        interval = t_interval(effects, claims.level)
        effect, low, high = float(effects.mean()), interval.low, interval.high
    if len(effects) < claims.worlds:
        units = "rounds of the benchmark" if claim.measure == "step_cost" else "worlds"
        why = f"{len(effects)} of {claims.worlds} {units} have an effect"
        return Verdict(claim, effects, effect, low, high, CANNOT_BE_TOLD, why, *_at_largest(claim, measures))
    verdict = where_lies(low, high, claim.above, claim.below)
    return Verdict(claim, effects, effect, low, high, verdict, "", *_at_largest(claim, measures))


def _at_largest(claim: Claim, measures: pd.DataFrame) -> tuple[float, float]:
    """The share of pairs behind a bound of ε that hold up to the largest ε tried, and that ε; NaN of other measures."""
    column = f"{claim.measure}{AT_LARGEST}"
    if column not in measures:
        return np.nan, np.nan
    rows = measures[measures["recipe"].isin(claim.recipes)]
    return rows[column].mean(), rows["largest_epsilon"].max()


def where_lies(low: float, high: float, above: float | None, below: float | None) -> str:
    """The verdict on a claimed range, of which None leaves an end open, by the interval from `low` to `high`."""
    above = -np.inf if above is None else above
    below = np.inf if below is None else below
    if low > above and high < below:
        return HOLDS
    if high <= above or low >= below:
        return DOES_NOT_HOLD
    return CANNOT_BE_TOLD


def verdicts_on(claims: Claims, measures: pd.DataFrame, rounds: pd.DataFrame) -> list[Verdict]:
    """Test all claims, in the order of their file.

    Args:
        measures: of `measure_runs`.
        rounds: of `read_rounds`.
    """
    return [verdict_on(claim, claims, measures, rounds) for claim in claims.claims]


def as_table(verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per claim: name, place, says, measure, unit, above, below, effect, low, high, worlds, verdict, why,
    at_largest, lower_limit (whether the effect is one, see `Verdict`).

    A claim about the time of a step has rounds of the benchmark for worlds.
    """
    rows = []
    for verdict in verdicts:
        claim = verdict.claim
        rows.append(
            {
                "name": claim.name,
                "place": claim.place,
                "says": claim.says,
                "measure": claim.measure,
                "unit": MEASURES[claim.measure].unit,
                "above": claim.above,
                "below": claim.below,
                "effect": verdict.effect,
                "low": verdict.low,
                "high": verdict.high,
                "worlds": len(verdict.effects),
                "verdict": verdict.verdict,
                "why": verdict.why,
                "at_largest": verdict.at_largest,
                "lower_limit": verdict.is_lower_limit,
            }
        )
    return pd.DataFrame(rows)
