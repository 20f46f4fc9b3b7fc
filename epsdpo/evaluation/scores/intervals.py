"""How sure a number is: every interval and standard error of this kit.

Values about one prompt stand together, as their conversations do. Where all are of conversations of their own, each
number is that of the formula for independent values, to the last digit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from epsdpo.evaluation.scores.clusters import clusters_of, resamples


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the units of what it bounds."""

    low: float
    high: float


def standard_error(values: Sequence[float], prompts: Sequence[str] | None = None, scale: float = 1.0) -> float:
    """Of the mean of the values, times `scale` (100 for percent of shares); NaN where all are about one prompt.

    √(G/(G-1) Σ_g (Σ_{i in g} (x_i - mean))²) / n over G conversations, which is deviation (n - 1) / √n for G = n.
    """
    values = np.asarray(values, dtype=np.float64)
    clusters = clusters_of(prompts, values.size)
    groups = int(clusters.max(initial=-1)) + 1
    if groups < 2:
        return float("nan")
    if groups == values.size:
        return float(scale * values.std(ddof=1) / np.sqrt(values.size))
    sums = np.bincount(clusters, weights=values - values.mean())
    return float(scale * np.sqrt(groups / (groups - 1) * (sums**2).sum()) / values.size)


def bootstrap_interval(
    values: Sequence[float],
    samples: int,
    seed: int,
    level: float = 0.95,
    units: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
) -> Interval:
    """Percentile bootstrap of the mean of `values` over prompts, or of Σ values / Σ `units` (a rate per unit).

    The same prompts and the same seed give the same resamples, so that intervals of several measures on the same
    prompts belong together. NaN for several values that are all about one prompt.

    Args:
        values: one value per prompt, or several, none missing.
        samples: how many times the prompts are resampled.
        seed: of the resamples.
        level: coverage in (0, 1).
        units: what each value counts, e.g. the tokens of each response.
        prompts: what each value is about, as text; by default each is about another prompt.

    Raises:
        ValueError: if there is no value, or one is missing.
    """
    values = np.asarray(values, dtype=np.float64)
    units = np.ones_like(values) if units is None else np.asarray(units, dtype=np.float64)
    if values.size == 0 or np.isnan(values).any() or np.isnan(units).any():
        raise ValueError(f"a bootstrap needs one number per prompt; got {values.size} values, some may be missing")
    clusters = clusters_of(prompts, values.size)
    return bootstrap(lambda rows: values[rows].sum() / units[rows].sum(), clusters, samples, seed, level)


def bootstrap(
    statistic: Callable[[np.ndarray], float], clusters: np.ndarray, samples: int, seed: int, level: float = 0.95
) -> Interval:
    """Percentile bootstrap: the middle `level` of a statistic of the rows of each resample.

    NaN if no resample has one; those in which it is NaN are left out.

    Args:
        statistic: of numbers of rows.
        clusters: of `clusters_of`, a number per row.
    """
    estimates = np.array([statistic(rows) for rows in resamples(clusters, samples, seed)], dtype=np.float64)
    estimates = estimates[~np.isnan(estimates)]
    if estimates.size == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(estimates, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(float(low), float(high))


def share_interval(hits: Sequence[bool], prompts: Sequence[str] | None = None, level: float = 0.95) -> Interval:
    """Wilson's interval of the share of hits, with as many observations as the conversations are worth.

    That is the number of independent ones with the share's own standard error, the values at most; where all hit or
    none does, the number of conversations.
    """
    hits = np.asarray(hits, dtype=np.float64)
    share, clusters = hits.mean(), clusters_of(prompts, hits.size)
    size = float(clusters.max() + 1)
    if size < hits.size and 0.0 < share < 1.0 and size > 1.0:
        error = standard_error(hits, prompts)
        size = min(float(hits.size), share * (1.0 - share) / error**2) if error > 0.0 else float(hits.size)
    z = ndtri(0.5 + 0.5 * level)
    scale = 2.0 * (size + z**2)
    centre, half = (2.0 * size * share + z**2) / scale, z / scale * np.sqrt(4.0 * size * share * (1.0 - share) + z**2)
    return Interval(
        0.0 if share == 0.0 else float(centre - half),
        1.0 if share == 1.0 else float(centre + half),
    )


def t_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent numbers, such as one per seed or per world.

    Raises:
        ValueError: if there are fewer than two.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        raise ValueError(f"Student's t needs two numbers at least, there is {values.size}")
    return students_interval(values.mean(), values.var(ddof=1) / values.size, values.size - 1, level)


def prediction_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of one more number of the kind of `values`, such as what another seed would give.

    Raises:
        ValueError: if there are fewer than two.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        raise ValueError(f"Student's t needs two numbers at least, there is {values.size}")
    return students_interval(values.mean(), values.var(ddof=1) * (1.0 + 1.0 / values.size), values.size - 1, level)


def students_interval(mean: float, variance: float, freedom: float, level: float) -> Interval:
    """Student's t interval around a mean whose estimated variance has `freedom` degrees of freedom."""
    half = stdtrit(freedom, 0.5 + level / 2.0) * np.sqrt(variance)
    return Interval(float(mean - half), float(mean + half))
