"""From measures of runs to the effect that a claim is about, one number per world, or per round of a benchmark.

A world is the unit that is repeated: it has its own SFT model, instructions, labels and pairs, and all recipes are run
in the same worlds, so that a difference is taken within each.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from epsdpo.paper.claims.settings import Claim

_FRONTIER_POINTS = 64


def effects_of(claim: Claim, measures: pd.DataFrame, rounds: pd.DataFrame) -> pd.Series:
    """The effect in each world that has all runs of the claim; worlds without are left out.

    Args:
        measures: one row per run with recipe, world and the claim's measure, of `measure_runs`.
        rounds: of `read_rounds`, for claims about the time of a step: there rounds stand in for worlds and
            contenders of the benchmark for recipes.

    Returns:
        Effect by world, or by length and round, in the unit of the measure.
    """
    if claim.measure == "step_cost":
        return extra_time(rounds, *claim.of, *claim.minus)
    needed = ["win_rate", "forward_kl_per_response"] if claim.combine == "frontier" else [claim.measure]
    if not {"recipe", "world", *needed} <= set(measures):  # no run, or none that was measured in this way
        return pd.Series(dtype=float)
    rows = measures[measures["recipe"].isin(claim.recipes)].dropna(subset=needed)
    if claim.combine == "frontier":
        effects = {world: _height(claim, inside.set_index("recipe")) for world, inside in rows.groupby("world")}
        return pd.Series(effects, dtype=float).dropna()
    by_world = rows.pivot(index="world", columns="recipe", values=claim.measure).reindex(columns=claim.recipes).dropna()
    combined = {"mean": np.mean, "sum": np.sum, "range": np.ptp}[claim.combine]
    effects = by_world[claim.of].apply(combined, axis=1, raw=True)
    if claim.minus:
        effects -= by_world[claim.minus].apply(combined, axis=1, raw=True)
    return effects.astype(float)


def _height(claim: Claim, by_recipe: pd.DataFrame) -> float:
    if not set(claim.recipes) <= set(by_recipe.index):
        return float("nan")
    return frontier_height(by_recipe.loc[claim.of], by_recipe.loc[claim.minus])


def measured_worlds(claim: Claim, measures: pd.DataFrame) -> set[int]:
    """The worlds in which all recipes of a claim were run, whether or not they have an effect there."""
    if not claim.recipes or "recipe" not in measures:
        return set()
    rows = measures[measures["recipe"].isin(claim.recipes)]
    runs = set(zip(rows["recipe"], rows["world"], strict=True))
    return {world for _, world in runs if all((recipe, world) in runs for recipe in claim.recipes)}


def frontier_height(above: pd.DataFrame, below: pd.DataFrame) -> float:
    """By how much one frontier lies above another, in points of win rate (Figure 4b).

    The runs of each are joined by straight lines over the logarithm of the forward KL, and the difference is averaged
    over the stretch that both cover. NaN where there is none, or where an estimate of the KL is not above 0.

    Args:
        above, below: rows with win_rate (percent) and forward_kl_per_response (nats).
    """
    if min(above["forward_kl_per_response"].min(), below["forward_kl_per_response"].min()) <= 0.0:
        return float("nan")
    curves = []
    for runs in (above, below):
        runs = runs.sort_values("forward_kl_per_response")
        curves.append((np.log(runs["forward_kl_per_response"].to_numpy()), runs["win_rate"].to_numpy()))
    left = max(places[0] for places, _ in curves)
    right = min(places[-1] for places, _ in curves)
    if not left < right:
        return float("nan")
    grid = np.linspace(left, right, _FRONTIER_POINTS)
    first, second = (np.interp(grid, places, rates) for places, rates in curves)
    return float(np.mean(first - second))


def extra_time(rounds: pd.DataFrame, contender: str, peer: str) -> pd.Series:
    """By how much a step of one contender takes longer than a peer's, in percent, in each round that has both.

    Args:
        rounds: of `read_rounds`.

    Returns:
        100 (seconds / seconds of the peer - 1) by length and round.
    """
    seconds = rounds.set_index(["contender", "length", "round"])["seconds"].astype(float)
    one, other = (seconds[seconds.index.get_level_values("contender") == name] for name in (contender, peer))
    return (100.0 * (one.droplevel("contender") / other.droplevel("contender") - 1.0)).dropna()
