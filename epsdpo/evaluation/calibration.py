"""Published judgements, judged again by a judge of one's own, so that its numbers can be read beside published ones."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.evaluation.judge import LazyJudge
from epsdpo.evaluation.judged_before import Published
from epsdpo.evaluation.judges.comparison import Judgement
from epsdpo.evaluation.judges.counts import in_both_orders, summarise
from epsdpo.evaluation.scores.clusters import clusters_of
from epsdpo.evaluation.scores.intervals import Interval, bootstrap, bootstrap_interval, share_interval


def judge_again(published: Published, judge: LazyJudge, samples: int, seed: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Judge published comparisons and put the two judges beside each other.

    Returns:
        A row per comparison (instruction, official, judged: preferences, NaN where judging failed), and for the summary
        how many this judge failed on and why, the numbers of `Calibration` and, where it saw both orders, of
        `Positions`, each interval as a pair of keys.

    Raises:
        JudgeError: if the judge cannot be asked.
        ValueError: if fewer than two comparisons are judged by both.
    """
    judgements = judge.compare(published.comparisons)
    judged = [judgement.preference for judgement in judgements]
    instructions = [comparison.instruction for comparison in published.comparisons]
    found = asdict(calibrate(published.preferences, judged, samples, seed, prompts=instructions))
    counts = summarise(judgements)
    numbers: dict[str, Any] = {"judge": published.judge, "model": published.model}
    numbers |= {name: counts[name] for name in ("n_failed", "failures")}
    for name, value in (found | asdict(positions(judgements, instructions, samples, seed))).items():
        if isinstance(value, dict):
            numbers |= {name: value["value"], **{f"{name}_{end}": bound for end, bound in value["interval"].items()}}
        else:
            numbers[name] = value
    table = pd.DataFrame({"instruction": instructions, "official": published.preferences, "judged": judged})
    return table.astype({"official": "float64", "judged": "float64"}), numbers


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
        chance: agreement if the judge's answers were dealt to the prompts at random: its mean, and the interval that
            holds it in 95 % of deals. A judge that can tell which output the other prefers is above that.
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
    chance: Measure


@dataclass(frozen=True)
class Positions:
    """How much the judge minds the order, over the comparisons that it saw in both.

    Attributes:
        n_both_orders: how many these are; without any there are no measures.
        position_bias: how much likelier than 1/2 the output shown first wins, in points.
        position_consistency: share of those whose two answers prefer the same output.
    """

    n_both_orders: int
    position_bias: Measure | None = None
    position_consistency: Measure | None = None


def positions(judgements: list[Judgement], prompts: Sequence[str], samples: int, seed: int) -> Positions:
    """Of judgements, each about the prompt of its place."""
    found = in_both_orders(judgements)
    if not found:
        return Positions(0)
    about = [prompts[item.number] for item in found]
    points = [100.0 * (item.first_wins - 0.5) for item in found]
    same = [item.consistent for item in found]
    return Positions(
        n_both_orders=len(found),
        position_bias=Measure(float(np.mean(points)), bootstrap_interval(points, samples, seed, prompts=about)),
        position_consistency=Measure(float(np.mean(same)), share_interval(same, about)),
    )


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
        prompts: what each comparison is about, as text: all about one are resampled together. By default each is about
            another.

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
        chance=_by_chance(pairs, clusters, samples, seed, level),
    )


def _correlation(rows: np.ndarray) -> float:
    centred = rows - rows.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    return float((centred[:, 0] * centred[:, 1]).sum() / spread.prod()) if (spread > 0.0).all() else float("nan")


def _agreement(rows: np.ndarray) -> float:
    sides = np.sign(rows - 1.5)
    return 100.0 * float(np.mean(1.0 - np.abs(sides[:, 0] - sides[:, 1]) / 2.0))


def _by_chance(pairs: np.ndarray, clusters: np.ndarray, samples: int, seed: int, level: float) -> Measure:
    """Agreement when the judge's answers are shuffled, those about one conversation together."""
    members = [np.flatnonzero(clusters == number) for number in range(clusters.max() + 1)]
    official, generator = pairs[np.concatenate(members), 0], np.random.default_rng(seed)
    deals = []
    for _ in range(samples):
        dealt = np.concatenate([members[number] for number in generator.permutation(len(members))])
        deals.append(_agreement(np.stack([official, pairs[dealt, 1]], axis=1)))
    low, high = (1.0 - level) / 2.0, (1.0 + level) / 2.0
    # Agreement takes few values; the interval ends at ones that were dealt, and holds `level` of them at least.
    ends = Interval(float(np.quantile(deals, low, method="lower")), float(np.quantile(deals, high, method="higher")))
    return Measure(float(np.mean(deals)), ends)
