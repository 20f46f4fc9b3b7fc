"""Prediction intervals of a run's numbers, from repeats of it that differ in how a machine rounds.

Repeats with the run's own data are its peers, if there are enough; those that came to the same bits count once. Where
each made its data itself, with an own model of the embedded world, one of each data is: then only what these have in
common must be the same, and what follows from data is held against theirs by its means over tenths of the run.
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
# By how much wider intervals of rounding are, over the number of repeats: so that of three repeats of each of the
# demo's runs none is outside what the other two say.
_SPARE = 12.0
_FROM_DECISIONS = 0.02  # by how much the response of β to a mean step may vary and still be called one
_NUMBERS = {name for name in EXACT if name not in ("pair_ids", "texts", "token_ids")}
_TENTHS = 10
# At the first step 0 whatever the pairs are, as the policy is the reference.
_LOG_RATIOS = ["chosen_log_ratio", "rejected_log_ratio"]
# What a step has whatever its pairs are, or what follows from their decisions.
_OF_ANY_DATA = ("pairs", "relaxed_beta", "tightened_beta", "learning_rate")
_BETAS = ("beta_before", "beta_after")
_NUMBERS_AFTER_A_LEAP = ["chosen_logps", "rejected_logps", *_LOG_RATIOS, "loss", "grad_norm"]


@dataclass(frozen=True)
class Bands:
    """Where the numbers of a run should be.

    Attributes:
        peers: the repeats that they are from.
        same_data: whether these have the run's own data, or are of one data themselves.
        own: the run's numbers as they are compared, by step and column.
        averaged: columns of which a tenth of the run is compared, at its last step.
        low, high: where `own` should be; NaN where nothing is known.
        exact: columns that all peers have in common, which a run must have as well.
    """

    peers: list[RunNumbers]
    same_data: bool
    own: pd.DataFrame
    averaged: list[str]
    low: pd.DataFrame
    high: pd.DataFrame
    exact: list[str]

    def steps_of(self, quantity: str, step: int) -> list[int]:
        """The steps that a number at a step is the mean of."""
        steps = list(self.low.index)
        if quantity not in self.averaged or step == steps[0]:
            return [step]
        tenths = _tenths(len(steps), len(steps))
        return [steps[place] for place in np.flatnonzero(tenths == tenths[steps.index(step)])]


def bands_for(run: RunNumbers, gold: Gold) -> Bands:
    """The intervals for the steps of a run."""
    alike = list({tuple(repeat.steps["bits"]): repeat for repeat in gold.repeats if repeat.has_data_of(run)}.values())
    each = _one_of_each_data(gold.repeats)
    same_data = len(alike) >= FEWEST or len(each) == 1
    peers = alike if len(alike) >= FEWEST else gold.repeats if same_data else each
    own, tables = run.steps, [peer.steps for peer in peers]
    exact = [name for name in EXACT if all(table[name].equals(tables[0][name]) for table in tables)]
    numbers = [name for name in (*EXACT, *MEASURED) if name in MEASURED or (name in _NUMBERS and name not in exact)]
    betas = _from_decisions(run.steps, tables)
    averaged = []
    if not same_data:
        averaged = [name for name in numbers if name not in _OF_ANY_DATA and (betas is None or name not in _BETAS)]
        own, *tables = (_means_over_tenths(table, averaged, len(tables[0])) for table in (own, *tables))
    stacked = np.stack([table[numbers].to_numpy(float) for table in tables])
    centre = pd.DataFrame(stacked.mean(axis=0), tables[0].index, numbers)
    pairs = tables[0]["pairs"] * (1 if same_data else max(len(centre) // _TENTHS, 1))
    half = _rounding(centre, pairs)
    if same_data:
        leapt = _has_leapt(run.steps, tables)
        half.loc[leapt, _NUMBERS_AFTER_A_LEAP] *= 1e3
        half.loc[leapt, ["relaxed", "tightened"]] *= 4.0
        half += _pooled(stacked, centre)
    else:
        half += _of_each_data(stacked, centre, peers, averaged)
    low, high = centre - half, centre + half
    if betas is not None:
        low.update(betas["low"])
        high.update(betas["high"])
    return Bands(peers, same_data, own, averaged, low, high, exact)


def summary_interval(name: str, bands: Bands, gold: Gold) -> tuple[float, float] | None:
    """The interval of a measure of the evaluation, over peers and other seeds; None where too few have it."""
    values = [run.summary[name] for run in (*bands.peers, *gold.other_seeds) if name in run.summary]
    if len(values) < FEWEST:
        return None
    # A measure in whole numbers, such as a length in characters, may be the same for all, and the next number here.
    step = float(all(value == round(value) for value in values))
    half = _factor(len(values)) * np.std(values, ddof=1) + step + 1e-6 * abs(np.mean(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _one_of_each_data(repeats: Sequence[RunNumbers]) -> list[RunNumbers]:
    different: list[RunNumbers] = []
    for repeat in repeats:
        if not any(repeat.has_data_of(other) for other in different):
            different.append(repeat)
    return different


def _tenths(steps: int, whole: int) -> np.ndarray:
    """Which tenth of a whole run each of so many steps belongs to."""
    return np.arange(steps) * _TENTHS // whole


def _means_over_tenths(steps: pd.DataFrame, columns: list[str], whole: int, how: str = "mean") -> pd.DataFrame:
    """`steps`, with the mean of these columns over each tenth of a `whole` run at its last step, and nothing before.

    A step has too few pairs for its number to be normal over data, and a run too many steps. At the first step, before
    any update, log-ratios stand as they are.

    Args:
        how: "sem" for the standard error of the mean.
    """
    tenths = _tenths(max(whole, len(steps)), whole)
    last = (tenths != np.append(tenths[1:], -1))[: len(steps)]
    means = steps[columns].astype(float).groupby(tenths[: len(steps)]).transform(how)
    means.loc[~last] = np.nan
    means.loc[means.index[:1], _LOG_RATIOS] = steps[_LOG_RATIOS].iloc[:1] if how == "mean" else 0.0
    return steps.assign(**means)


def _factor(repeats: int, steps: pd.DataFrame | int = 1) -> pd.DataFrame | float:
    """Standard deviations to either side, which are known from so many repeats at so many steps."""
    return stdtrit((repeats - 1.0) * steps, (1.0 + LEVEL) / 2.0) * (1.0 + 1.0 / repeats) ** 0.5


def _pooled(values: np.ndarray, centre: pd.DataFrame) -> pd.DataFrame:
    """Half widths for values (repeats, steps, columns) that differ by rounding.

    A step's variance is pooled with those before it that have one, and the largest up to there counts, as rounding
    grows while a run goes on, and not evenly, so that few repeats know little of it: hence `_SPARE`.
    """
    variance = pd.DataFrame(np.var(values, axis=0, ddof=1), centre.index, centre.columns)
    recent = variance.rolling(_POOLED, min_periods=1)
    return _SPARE / len(values) * recent.mean().cummax().pow(0.5) * _factor(len(values), recent.count().clip(lower=1))


def _has_leapt(run: pd.DataFrame, tables: Sequence[pd.DataFrame]) -> pd.Series:
    """At each step, whether before it a pair of the run decided as in no repeat.

    The β̃ of that pair is by ε another and so is the update that it took part in, by about a thousandth, and then more
    pairs may decide otherwise.
    """
    steps = tables[0].index
    own = run["decisions"].reindex(steps, fill_value="")
    alone = pd.concat([table["decisions"] != own for table in tables], axis=1).all(axis=1)
    return alone.cummax().shift(fill_value=False)


def _of_each_data(
    values: np.ndarray, centre: pd.DataFrame, peers: Sequence[RunNumbers], averaged: list[str]
) -> pd.DataFrame:
    """Half widths for values (repeats, steps, columns) of which each repeat's are of other data.

    By how much the repeats differ, where the variance of a mean over a tenth is pooled with those before it; and by how
    much a mean of so many steps may, since the data of two processors can have all but a few pairs in common.
    """
    variance = pd.DataFrame(np.var(values, axis=0, ddof=1), centre.index, centre.columns)
    half = variance.pow(0.5) * _factor(len(values))
    so_far = variance[averaged].expanding(min_periods=1)
    larger = np.fmax(so_far.mean(), variance[averaged]).pow(0.5)
    tables = [peer.steps for peer in peers]
    errors = [
        _means_over_tenths(table, averaged, len(centre), "sem")[averaged].fillna(table[averaged].std())
        for table in tables
    ]
    within = sum(error**2 for error in errors).div(len(errors)).pow(0.5)
    half[averaged] = larger * _factor(len(values), so_far.count().clip(lower=1)) + within * _factor(
        len(values), max(len(centre) // _TENTHS, 1)
    )
    return half


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
    # −log σ(β̃·margin) changes by 0.28 times the relative change of β̃ at most.
    allowed["loss"] += 0.28 * (size["relaxed_beta"] - 1.0).abs().max() / pairs if size["relaxed_beta"].any() else 0.0
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
    if not np.any(responses) and any(table["beta_before"].nunique() > 1 for table in tables):
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
