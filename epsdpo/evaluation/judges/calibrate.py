"""A judge beside the official one: how far new numbers can be read next to old ones.

This module compares two lists of preferences for the same comparisons. Making them is left to the caller: published
outputs with their published preferences on one side, `epsdpo.evaluation.judges.ask` on the same outputs on the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from epsdpo.evaluation.scores.clusters import clusters_of
from epsdpo.evaluation.scores.intervals import Interval, bootstrap


@dataclass(frozen=True)
class Measure:
    """A number with its percentile bootstrap over prompts."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """The judge against the official judge.

    Attributes:
        n_total: comparisons given.
        n_scored: those for which both have a preference; all else is about these.
        n_distinct: conversations that these are of.
        official_win_rate: in percent.
        judged_win_rate: in percent.
        bias: judged - official win rate, in points.
        scatter: standard deviation (n - 1) of the prompts' differences in preference, in points.
        correlation: Pearson's, of the preferences; NaN where one judge says the same of all.
        agreement: share in percent of the prompts on which both prefer the same output. Where both call a draw they
            agree; where one does, they half agree.
    """

    n_total: int
    n_scored: int
    n_distinct: int
    official_win_rate: float
    judged_win_rate: float
    bias: Measure
    scatter: Measure
    correlation: Measure
    agreement: Measure


def calibrate(
    official: Sequence[float | None],
    judged: Sequence[float | None],
    samples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    prompts: Sequence[str] | None = None,
) -> Calibration:
    """Compare preferences in [1, 2] (None = failed) for the same comparisons in the same order.

    Args:
        samples: how many times the prompts are resampled for the intervals.
        seed: of the resamples.
        level: coverage of the intervals, in (0, 1).
        prompts: what each comparison is about, as text, resampled as `epsdpo.evaluation.scores.clusters` has it; by
        default each is about
            another prompt.

    Raises:
        ValueError: if the lists differ in length, fewer than two comparisons have both, or one is out of range.
    """
    if len(official) != len(judged):
        raise ValueError(
            f"{len(official)} official preferences and {len(judged)} judged ones; they must belong together"
        )
    pairs = np.array([official, judged], dtype=np.float64).T
    both = ~np.isnan(pairs).any(axis=1)
    clusters = np.unique(clusters_of(prompts, len(pairs))[both], return_inverse=True)[1]
    pairs = pairs[both]
    if len(pairs) < 2:
        raise ValueError(f"calibration needs two comparisons that both judged; {len(pairs)} of {len(official)} are")
    if outside := pairs[(pairs < 1.0) | (pairs > 2.0)].tolist():
        raise ValueError(f"preference {outside[0]:g} is outside [1, 2]; a failed judgement must be None")

    def measure(statistic: Callable[[np.ndarray], float]) -> Measure:
        # A resample in which one judge says the same of all has no correlation; it is left out.
        return Measure(statistic(pairs), bootstrap(lambda rows: statistic(pairs[rows]), clusters, samples, seed, level))

    official_rate, judged_rate = 100.0 * (pairs.mean(axis=0) - 1.0)
    return Calibration(
        n_total=len(official),
        n_scored=len(pairs),
        n_distinct=int(clusters.max()) + 1,
        official_win_rate=float(official_rate),
        judged_win_rate=float(judged_rate),
        bias=measure(lambda rows: 100.0 * float(np.mean(rows[:, 1] - rows[:, 0]))),
        scatter=measure(lambda rows: 100.0 * float(np.std(rows[:, 1] - rows[:, 0], ddof=1))),
        correlation=measure(_correlation),
        agreement=measure(_agreement),
    )


def _correlation(rows: np.ndarray) -> float:
    centred = rows - rows.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    return float((centred[:, 0] * centred[:, 1]).sum() / spread.prod()) if (spread > 0.0).all() else float("nan")


def _agreement(rows: np.ndarray) -> float:
    sides = np.sign(rows - 1.5)
    return 100.0 * float(np.mean(1.0 - np.abs(sides[:, 0] - sides[:, 1]) / 2.0))
