"""What it would have taken: the smallest effect that could be told with the worlds that were spent, and more worlds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy.optimize import brentq
from scipy.stats import nct, t

from epsdpo.paper.claims.names import MEASURES
from epsdpo.paper.claims.settings import Claims
from epsdpo.paper.claims.verdicts import CANNOT_BE_TOLD, Verdict

POWER = 0.8  # chance of being told
MOST_WORLDS = 10_000  # of more it is only said that they are more


def chance_of_telling(distance: float, deviation: float, worlds: int, level: float) -> float:
    """The chance that an interval over `worlds` ends short of a place that lies `distance` from the true effect.

    Args:
        deviation: standard deviation of the effect from world to world.
        level: coverage of the interval.
    """
    degrees = worlds - 1
    return float(nct.sf(t.ppf(0.5 + level / 2.0, degrees), degrees, distance * math.sqrt(worlds) / deviation))


def smallest_told(deviation: float, worlds: int, level: float) -> float:
    """How far from a place the true effect must lie to be told from it with a chance of `POWER`; in its unit."""
    if deviation == 0.0:
        return 0.0
    standard_error = deviation / math.sqrt(worlds)
    furthest = standard_error * (t.ppf(0.5 + level / 2.0, worlds - 1) + 10.0)  # there the chance is nearly 1

    def missing(distance: float) -> float:
        return chance_of_telling(distance, deviation, worlds, level) - POWER

    return float(brentq(missing, 0.0, furthest))


def worlds_needed(distance: float, deviation: float, level: float) -> int | None:
    """How many worlds tell, with a chance of `POWER`, an effect so far from a place; None for more than `MOST_WORLDS`.

    The chance grows with the number of worlds, so that it is found by halving.
    """
    if deviation == 0.0:
        return 2
    if distance <= 0.0 or chance_of_telling(distance, deviation, MOST_WORLDS, level) < POWER:
        return None
    too_few, enough = 1, MOST_WORLDS
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if chance_of_telling(distance, deviation, middle, level) < POWER:
            too_few = middle
        else:
            enough = middle
    return enough


def what_it_would_take(verdicts: Sequence[Verdict], claims: Claims) -> pd.DataFrame:
    """Of each claim that cannot be told, what could have been, and how many worlds the paper's own effect would need.

    Returns:
        name, says, unit, worlds, deviation (over worlds), smallest_told (from an end of the claimed range), printed
        (the paper's effect; missing where it prints none), worlds_needed (for `printed`; missing where there is none,
        where it lies on the end of the range, or where they are more than `MOST_WORLDS`).
    """
    rows = []
    for verdict in verdicts:
        claim, deviation = verdict.claim, verdict.deviation
        if verdict.verdict != CANNOT_BE_TOLD or claim.measure == "step_cost":
            continue
        told = needed = None
        printed = claims.printed.get(claim.name)
        if len(verdict.effects) > 1:
            told = smallest_told(deviation, len(verdict.effects), verdict.level)
            if printed is not None:
                ends = [end for end in (claim.above, claim.below) if end is not None]
                needed = worlds_needed(min(abs(printed - end) for end in ends), deviation, claims.level)
        rows.append(
            {
                "name": claim.name,
                "says": claim.says,
                "unit": MEASURES[claim.measure].unit,
                "worlds": len(verdict.effects),
                "deviation": deviation,
                "smallest_told": told,
                "printed": printed,
                "worlds_needed": needed,
            }
        )
    columns = ["name", "says", "unit", "worlds", "deviation", "smallest_told", "printed", "worlds_needed"]
    return pd.DataFrame(rows, columns=columns).astype({"worlds_needed": "Int64"})
