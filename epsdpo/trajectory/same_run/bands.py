"""Prediction intervals of a run's numbers, from repeats of it that differ in how a machine rounds.

Repeats with the run's own data are its peers, if there are enough. Else all are, as where each made its data itself,
with an own model of the embedded world: then only what they have in common must be the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from epsdpo.trajectory.same_run.gold_files import FEWEST, Gold
from epsdpo.trajectory.same_run.quantities import EXACT, MEASURED, RunNumbers

# A run has thousands of numbers: of one that is the published one, all are to be within their intervals.
LEVEL = 0.9999
_POOLED = 10  # steps whose variance is taken together
_FROM_DECISIONS = 0.02  # by how much the response of β to a mean step may vary and still be called one
_NUMBERS = {name for name in EXACT if name not in ("pair_ids", "texts", "token_ids")}


@dataclass(frozen=True)
class Bands:
    """Where the numbers of a run should be.

    Attributes:
        peers: the repeats that they are from.
        same_data: whether these have the run's own data.
        low, high: by step and column, for numbers; NaN where nothing is known.
        exact: columns that all peers have in common, which a run must have as well.
    """

    peers: list[RunNumbers]
    same_data: bool
    low: pd.DataFrame
    high: pd.DataFrame
    exact: list[str]


def bands_for(run: RunNumbers, gold: Gold) -> Bands:
    """The intervals for the steps of a run."""
    alike = [repeat for repeat in gold.repeats if repeat.has_data_of(run)]
    peers = alike if len(alike) >= FEWEST else _of_each_data(gold.repeats)
    tables = [peer.steps for peer in peers]
    exact = [name for name in EXACT if all(table[name].equals(tables[0][name]) for table in tables)]
    numbers = [name for name in (*EXACT, *MEASURED) if name in MEASURED or (name in _NUMBERS and name not in exact)]
    stacked = np.stack([table[numbers].to_numpy(float) for table in tables])
    centre, half = _interval(stacked, tables[0].index, numbers)
    half += _rounding(centre, tables[0]["pairs"])
    low, high = centre - half, centre + half
    betas = _from_decisions(run.steps, tables)
    if betas is not None:
        low.update(betas["low"])
        high.update(betas["high"])
    return Bands(peers, len(alike) >= FEWEST, low, high, exact)


def summary_interval(name: str, gold: Gold) -> tuple[float, float] | None:
    """The interval of a measure of the evaluation, over repeats and other seeds; None where too few have it."""
    values = [run.summary[name] for run in (*gold.repeats, *gold.other_seeds) if name in run.summary]
    if len(values) < FEWEST:
        return None
    half = _factor(len(values)) * np.std(values, ddof=1) + 1e-6 * abs(np.mean(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _of_each_data(repeats: Sequence[RunNumbers]) -> list[RunNumbers]:
    """One of those with the same data, unless they are too few then."""
    different: list[RunNumbers] = []
    for repeat in repeats:
        if not any(repeat.has_data_of(other) for other in different):
            different.append(repeat)
    return different if len(different) >= FEWEST else list(repeats)


def _factor(repeats: int, steps: pd.DataFrame | int = 1) -> pd.DataFrame | float:
    """Standard deviations to either side, which are known from so many repeats at so many steps."""
    return stdtrit((repeats - 1.0) * steps, (1.0 + LEVEL) / 2.0) * (1.0 + 1.0 / repeats) ** 0.5


def _interval(values: np.ndarray, steps: pd.Index, columns: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and half width, for values (repeats, steps, columns).

    A step's variance is pooled with those before it that have one, and the largest up to there counts, as rounding
    grows while a run goes on.
    """
    recent = pd.DataFrame(np.var(values, axis=0, ddof=1), steps, columns).rolling(_POOLED, min_periods=1)
    half = recent.mean().cummax().pow(0.5) * _factor(len(values), recent.count().clip(lower=1))
    return pd.DataFrame(values.mean(axis=0), steps, columns), half


def _rounding(centre: pd.DataFrame, pairs: pd.Series) -> pd.DataFrame:
    """What two machines may differ by though the repeats do not: float32 along sums, and a pair at the edge."""
    size = centre.abs()
    allowed = 1e-6 * size + 1e-6
    for side in ("chosen", "rejected"):
        allowed[f"{side}_log_ratio"] += 3e-7 * size[f"{side}_logps"]
    allowed[["relaxed_beta", "tightened_beta", "learning_rate"]] = (
        1e-6 * size[["relaxed_beta", "tightened_beta", "learning_rate"]]
    )
    for name in ("relaxed", "tightened"):
        allowed[name] = 1.01 / pairs
    allowed["loss_residual"] += 1e-6 * size["loss"]
    allowed["grad_norm"] = 1e-4 * size["grad_norm"]
    return allowed


def _from_decisions(run: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> dict[str, pd.DataFrame] | None:
    """Where β should be by the run's own decisions, as the repeats' β follows from theirs.

    Relative to the repeat whose decisions are alike for longest; as long as they are, β has no room at all. None for a
    method whose β does not follow from decisions.
    """
    responses = np.concatenate([response_of(table).dropna() for table in tables])
    response = float(np.median(responses)) if len(responses) else 0.0
    if len(responses) and np.ptp(responses) > _FROM_DECISIONS * abs(response) + 1e-12:
        return None
    steps = run.index.intersection(tables[0].index)
    nearest = max(tables, key=lambda table: _alike_for(run.loc[steps], table.loc[steps])).loc[steps]
    apart = _mean_step(run.loc[steps]) - _mean_step(nearest)
    low, high = {}, {}
    for name, after in (("beta_before", apart.shift(fill_value=0.0)), ("beta_after", apart)):
        expected = nearest[name] * np.exp(response * after.cumsum())
        room = expected * (1e-9 + abs(response) * (_FROM_DECISIONS + abs(response)) * after.abs().cumsum())
        low[name], high[name] = expected - room, expected + room
    return {"low": pd.DataFrame(low), "high": pd.DataFrame(high)}


def response_of(steps: pd.DataFrame) -> pd.Series:
    """By how much log β moved per mean step, of each step that had one."""
    mean_step = _mean_step(steps)
    return np.log(steps["beta_after"] / steps["beta_before"]) / mean_step.where(mean_step != 0.0)


def _mean_step(steps: pd.DataFrame) -> pd.Series:
    return steps["relaxed"].fillna(0.0) - steps["tightened"].fillna(0.0)


def _alike_for(run: pd.DataFrame, repeat: pd.DataFrame) -> int:
    differs = (run["decisions"] != repeat["decisions"]).to_numpy()
    return int(differs.argmax()) if differs.any() else len(differs)
