"""Shares of the decisions as the model of rounding foretells them, and beside them those that were measured.

A prediction is about these very pairs: of chances p of a decision follows how many pairs will choose it, and the range
that holds this number in 95 % of cases if each pair decides by itself. A share outside it is off. Of many shares some
are off by chance: about one in twenty, or fewer, since counts come in whole pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import share_interval, standard_error, students_interval
from epsdpo.paper.precision.decisions import ARITHMETICS
from epsdpo.trajectory.summary import DECISIONS

ROUNDED = tuple(name for name in ARITHMETICS if name != "float32")
ALL = "all"  # of lengths
_GROUP = ["policy", "epsilon", "length"]
_TERCILES = (1 / 3, 2 / 3)


def predictions(table: pd.DataFrame) -> pd.DataFrame:
    """What every share will be, from the chances of the pairs alone.

    Args:
        table: `foretold_table` of several policies and ε, with a column policy.

    Returns:
        One row per policy, ε, length (all pairs, and thirds of them), arithmetic and decision: these, pairs, predicted,
        expected_low, expected_high.
    """
    rows = []
    for group, alike in _groups(table):
        for arithmetic in ROUNDED:
            for decision in DECISIONS:
                chances = alike[f"{arithmetic} {decision}"].to_numpy()
                low, high = expected_range(chances)
                rows.append(
                    {**group, "arithmetic": arithmetic, "decision": decision, "pairs": len(alike)}
                    | {"predicted": chances.mean(), "expected_low": low, "expected_high": high}
                )
    return pd.DataFrame(rows)


def expected_range(chances: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The shares between which the share of hits lies in `level` of cases at least, with a tail as likely on each side.

    Args:
        chances: (pairs,) of a hit, each independent of the others.
    """
    counts = np.ones(1)
    for chance in np.clip(chances, 0.0, 1.0):
        counts = np.convolve(counts, [1.0 - chance, chance])
    below, tail = np.cumsum(counts), (1.0 - level) / 2.0
    low, high = np.searchsorted(below, tail, side="right"), np.searchsorted(below, 1.0 - tail, side="left")
    return low / len(chances), min(high, len(chances)) / len(chances)


def compared(foretold: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """What was measured, beside what was foretold.

    Args:
        foretold: of `predictions`, as they were written.
        table: that which they were made from, with what each of `ARITHMETICS` decides, and prompt.

    Returns:
        The rows of `foretold` and, without a prediction, of float32: with share, low, high (95 % Wilson interval over
        prompts), and off (whether the share lies outside the expected range).
    """
    rows = []
    for group, alike in _groups(table):
        for arithmetic in ARITHMETICS:
            for name, decision in DECISIONS.items():
                hits = alike[arithmetic] == decision
                interval = share_interval(hits, alike["prompt"].tolist())
                rows.append(
                    {**group, "arithmetic": arithmetic, "decision": name, "measured_pairs": len(alike)}
                    | {"share": hits.mean(), "low": interval.low, "high": interval.high}
                )
    keys = [*_GROUP, "arithmetic", "decision"]
    both = pd.DataFrame(rows).merge(foretold, on=keys, how="left", validate="one_to_one")
    # Shares are whole pairs over pairs on both sides; the tolerance is for their division.
    outside = (both["share"] < both["expected_low"] - 1e-9) | (both["share"] > both["expected_high"] + 1e-9)
    return both.assign(off=outside)


def mean_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The mean step, share of β⁻ less share of β⁺, by policy, ε and arithmetic.

    Returns:
        policy, epsilon, arithmetic, mean_step, low, high (95 % by Student's t over prompts), predicted (NaN for
        float32).
    """
    rows = []
    for (policy, epsilon), alike in table.groupby(["policy", "epsilon"], sort=False):
        prompts = alike["prompt"].tolist()
        for arithmetic in ARITHMETICS:
            steps = alike[arithmetic].to_numpy(dtype=float)
            error = standard_error(steps, prompts)
            interval = students_interval(steps.mean(), error**2, distinct(prompts) - 1, 0.95)
            row = {"policy": policy, "epsilon": epsilon, "arithmetic": arithmetic, "mean_step": steps.mean()}
            row |= {"low": interval.low, "high": interval.high, "predicted": np.nan}
            if arithmetic != "float32":
                row["predicted"] = alike[f"{arithmetic} relaxed"].mean() - alike[f"{arithmetic} tightened"].mean()
            rows.append(row)
    return pd.DataFrame(rows)


def _groups(table: pd.DataFrame) -> Iterator[tuple[dict[str, object], pd.DataFrame]]:
    """Rows alike in policy and ε, all of them and then by thirds of their length in tokens."""
    for (policy, epsilon), alike in table.groupby(["policy", "epsilon"], sort=False):
        group = {"policy": policy, "epsilon": epsilon}
        yield {**group, "length": ALL}, alike
        edges = np.unique(alike["tokens"].quantile(_TERCILES))
        for _, third in alike.groupby(np.digitize(alike["tokens"], edges, right=True)):
            yield {**group, "length": f"{third['tokens'].min()} to {third['tokens'].max()}"}, third
