"""From effects to verdicts: an interval over worlds, and where it lies.

One rule for all claims, stated before the runs: a claim holds if the whole interval lies in its range, does not hold
if none of it does, makes no difference of practical size if the whole lies within its margin about 0, and otherwise
cannot be told with these runs. With several looks the first one that decides has the last word; the error of each is
its own, so that together they keep the level (Bonferroni's inequality, whatever is decided in between).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.special import stdtr

from epsdpo.evaluation.scores.intervals import t_interval
from epsdpo.paper.claims.effects import effects_of, measured_worlds
from epsdpo.paper.claims.multiplicity import holm
from epsdpo.paper.claims.names import AT_LARGEST, MEASURES
from epsdpo.paper.claims.settings import Claim, Claims, Look

HOLDS, DOES_NOT_HOLD, CANNOT_BE_TOLD = "holds", "does not hold", "cannot be told"
NO_DIFFERENCE = "no difference of practical size"
VERDICTS = (HOLDS, DOES_NOT_HOLD, NO_DIFFERENCE, CANNOT_BE_TOLD)


@dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim.

    Attributes:
        effects: one per world (per round of the benchmark, for the time of a step), in the unit of the measure.
        effect, low, high: their mean and its interval, Student's t over worlds; NaN with fewer than two.
        level: coverage of that interval.
        looked_at: how many worlds the last look was after: the one that decided, or the last that could be taken; 0
            before the first.
        p: the smallest error, over all looks together, at which the claim would have been decided by now.
        family_wise: the verdict with Holm's correction for all claims of the file: `verdict`, or that it cannot be
            told.
        margin: the largest effect, either way, that makes no practical difference; None if there is none.
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
    level: float
    looked_at: int
    p: float
    family_wise: str = CANNOT_BE_TOLD
    margin: float | None = None
    why: str = ""
    at_largest: float = np.nan
    largest: float = np.nan

    @property
    def is_lower_limit(self) -> bool:
        return self.at_largest > 0.0 and not self.claim.is_difference

    @property
    def deviation(self) -> float:
        """Standard deviation of the effects over worlds; NaN with fewer than two."""
        return float(self.effects.std(ddof=1))


def verdict_on(claim: Claim, claims: Claims, measures: pd.DataFrame, rounds: pd.DataFrame) -> Verdict:
    """Test one claim on the measures of all runs, or on the rounds of the benchmark, look after look."""
    effects, margin = effects_of(claim, measures, rounds), claims.margins.get(claim.name)
    timed, measured = claim.measure == "step_cost", measured_worlds(claim, measures)
    looks = claims.looks_at(claim)
    at_largest, largest = _at_largest(claim, measures)
    found, p = None, 1.0
    for look in looks:
        worlds = None if timed else claims.worlds_of(look)
        if worlds is not None and not measured.issuperset(worlds):
            break
        seen = effects if worlds is None else effects[effects.index.isin(worlds)]
        found = _at_look(claim, seen, look, margin)
        p = min(p, found.p * (1.0 - claims.level) / look.error)
        if found.verdict != CANNOT_BE_TOLD:
            break
    if found is None:  # too soon: what there is is shown, and decides nothing
        found = replace(_at_look(claim, effects, looks[0], margin), verdict=CANNOT_BE_TOLD, looked_at=0, why="")
    later = [look.worlds for look in looks if look.worlds > found.looked_at]
    if found.verdict == CANNOT_BE_TOLD and later and not found.why:
        found = replace(found, why=f"open until a look after {later[0]} worlds")
    return replace(found, p=p, margin=margin, at_largest=at_largest, largest=largest)


def _at_look(claim: Claim, effects: pd.Series, look: Look, margin: float | None) -> Verdict:
    effect = low = high = float("nan")
    level = 1.0 - look.error
    if len(effects) > 1:
        interval = t_interval(effects, level)
        effect, low, high = float(effects.mean()), interval.low, interval.high
    if len(effects) < look.worlds:
        units = "rounds of the benchmark" if claim.measure == "step_cost" else "worlds"
        why = f"{len(effects)} of {look.worlds} {units} have an effect"
        return Verdict(claim, effects, effect, low, high, CANNOT_BE_TOLD, level, look.worlds, p=1.0, why=why)
    verdict = where_lies(low, high, claim.above, claim.below, margin)
    p = smallest_error(effects.to_numpy(), claim.above, claim.below, margin)
    return Verdict(claim, effects, effect, low, high, verdict, level, look.worlds, p)


def _at_largest(claim: Claim, measures: pd.DataFrame) -> tuple[float, float]:
    """The share of pairs behind a bound of ε that hold up to the largest ε tried, and that ε; NaN of other measures."""
    column = f"{claim.measure}{AT_LARGEST}"
    if column not in measures:
        return np.nan, np.nan
    rows = measures[measures["recipe"].isin(claim.recipes)]
    return rows[column].mean(), rows["largest_epsilon"].max()


def where_lies(low: float, high: float, above: float | None, below: float | None, margin: float | None = None) -> str:
    """The verdict by the interval from `low` to `high`.

    A claimed range comes first: an effect may lie in it, or outside of it, and be of no practical size as well.

    Args:
        above, below: ends of the claimed range; None leaves one open.
        margin: of no practical size is what lies within ± this; None if there is no such size.
    """
    above = -np.inf if above is None else above
    below = np.inf if below is None else below
    if low > above and high < below:
        return HOLDS
    if high <= above or low >= below:
        return DOES_NOT_HOLD
    if margin is not None and low > -margin and high < margin:
        return NO_DIFFERENCE
    return CANNOT_BE_TOLD


def smallest_error(effects: np.ndarray, above: float | None, below: float | None, margin: float | None) -> float:
    """The smallest error 1 - level at which the interval of the effects gives a verdict (a p-value, in (0, 1]).

    Each verdict needs the interval to end on the right side of one or two places; at error α it ends t(1 - α/2)
    standard errors from the mean.
    """
    mean, error = float(np.mean(effects)), float(np.std(effects, ddof=1)) / math.sqrt(len(effects))

    def needed(distance: float) -> float:
        if error == 0.0:
            return 0.0 if distance > 0.0 else 1.0
        return min(1.0, 2.0 * float(stdtr(len(effects) - 1, -distance / error)))

    above = -math.inf if above is None else above
    below = math.inf if below is None else below
    inside = max(needed(mean - above), needed(below - mean))
    outside = min(needed(above - mean), needed(mean - below))
    small = 1.0 if margin is None else max(needed(mean + margin), needed(margin - mean))
    return min(inside, outside, small)


def verdicts_on(claims: Claims, measures: pd.DataFrame, rounds: pd.DataFrame) -> list[Verdict]:
    """Test all claims, in the order of their file, each by itself and all together by Holm's correction.

    Args:
        measures: of `measure_runs`.
        rounds: of `read_rounds`.
    """
    found = [verdict_on(claim, claims, measures, rounds) for claim in claims.claims]
    decided = holm([verdict.p for verdict in found], 1.0 - claims.level)
    return [
        replace(one, family_wise=one.verdict if sure else CANNOT_BE_TOLD)
        for one, sure in zip(found, decided, strict=True)
    ]


def as_table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim: name, place, says, measure, unit, above, below, margin, effect, low, high, level, worlds,
    looked_at, verdict, p, family_wise, why, at_largest, lower_limit (whether the effect is one, see `Verdict`).

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
                "margin": verdict.margin,
                "effect": verdict.effect,
                "low": verdict.low,
                "high": verdict.high,
                "level": verdict.level,
                "worlds": len(verdict.effects),
                "looked_at": verdict.looked_at,
                "verdict": verdict.verdict,
                "p": verdict.p,
                "family_wise": verdict.family_wise,
                "why": verdict.why,
                "at_largest": verdict.at_largest,
                "lower_limit": verdict.is_lower_limit,
            }
        )
    return pd.DataFrame(rows)
