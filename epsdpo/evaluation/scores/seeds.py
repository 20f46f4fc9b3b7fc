"""The judged runs of one recipe joined over their seeds, and what each of their intervals covers. Rates in percent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.annotations import Annotations
from epsdpo.evaluation.scores.clusters import clusters_of, distinct
from epsdpo.evaluation.scores.intervals import Interval, bootstrap_interval, students_interval, t_interval
from epsdpo.evaluation.scores.winrate import wins_of


@dataclass(frozen=True)
class SeedsJoined:
    """Runs of one recipe with different seeds, judged on the same prompts.

    Attributes:
        rates: win rate of each run on the prompts that are scored in all of them.
        n_prompts: how many those are.
        n_left_out: prompts asked of some run that are not among them.
        win_rate: mean of the rates.
        deviation: standard deviation (n - 1) of the rates, the spread between seeds.
        prompts_interval: bootstrap over prompts; covers other prompts, with these very runs.
        seeds_interval: Student's t over the rates; covers other seeds, on these very prompts.
        interval: covers other seeds and other prompts; the one to state for a recipe.
    """

    rates: tuple[float, ...]
    n_prompts: int
    n_left_out: int
    win_rate: float
    deviation: float
    prompts_interval: Interval
    seeds_interval: Interval
    interval: Interval


def join_seeds(
    runs: Sequence[Annotations], samples: int, seed: int, level: float = 0.95, reference_redrawn: bool = False
) -> SeedsJoined:
    """Join runs that differ in their seed alone.

    The interval for both comes from a model with an effect of each seed, an effect of each prompt and what is left,
    preference = μ + a_seed + b_prompt + rest. The variance of the mean is (MS_seed + MS_prompt - MS_rest) / (seeds ·
    prompts), no component below zero, its degrees of freedom Satterthwaite's. With few seeds that differ it is wide.
    Prompts of one conversation have one effect together.

    Args:
        reference_redrawn: whether each run was compared with responses of its own, drawn from the one reference model.
            What that draw changes is then part of what seeds change.

    Raises:
        ValueError: if there are fewer than two runs, references or judges differ, or fewer than two prompts are scored
            in all runs.
    """
    if len(runs) < 2:
        raise ValueError(f"joining seeds needs two runs at least, there is {len(runs)}: one run has no spread")
    wins, prompts, n_shared, n_asked = _joined(runs, same_outputs=not reference_redrawn)
    if distinct(prompts) < 2:
        raise ValueError(f"joining seeds needs two prompts at least that are scored in all runs; of {n_shared} one is")
    percent = 100.0 * wins
    rates = percent.mean(axis=1)
    return SeedsJoined(
        rates=tuple(map(float, rates)),
        n_prompts=wins.shape[1],
        n_left_out=n_asked - wins.shape[1],
        win_rate=float(percent.mean()),
        deviation=float(rates.std(ddof=1)),
        prompts_interval=bootstrap_interval(percent.mean(axis=0), samples, seed, level, prompts=prompts),
        seeds_interval=t_interval(rates, level),
        interval=_two_way_interval(_by_conversation(percent, prompts), level),
    )


def _joined(runs: Sequence[Annotations], same_outputs: bool = True) -> tuple[np.ndarray, list[str], int, int]:
    """Wins (runs, prompts) where every run has one, these prompts, how many are shared, and how many any run has.

    Prompts are in the order of their text, so that no file's order matters.
    """
    for run in runs[1:]:
        for role in ("reference", "annotator"):
            mine, theirs = getattr(run, role), getattr(runs[0], role)
            if mine != theirs:
                raise ValueError(f"{run.path} has the {role} {mine!r}, {runs[0].path} has {theirs!r}: not comparable")
    tables = [run.prompts.set_index("instruction") for run in runs]
    shared = pd.concat(tables, axis=1, join="inner", keys=range(len(runs))).sort_index()
    n_asked = len(set().union(*(table.index for table in tables)))
    for position, run in enumerate(runs if same_outputs else ()):
        mine, theirs = shared[position]["reference_length"], shared[0]["reference_length"]
        differ = mine.notna() & theirs.notna() & mine.ne(theirs)
        if differ.any():
            raise ValueError(
                f"{run.path} and {runs[0].path}: {differ.sum()} prompts have reference outputs of different lengths, "
                f"the first is {differ.idxmax()[:60]!r}: not one reference"
            )
    wins = np.stack([wins_of(shared[position]["preference"]) for position in range(len(runs))])
    scored = ~np.isnan(wins).any(axis=0)
    wins = wins[:, scored]
    if wins.shape[1] == 0:
        raise ValueError(f"no prompt is scored in all of {', '.join(str(run.path) for run in runs)}")
    return wins, shared.index[scored].tolist(), len(shared), n_asked


def _by_conversation(values: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Values (seeds, conversations) with the means of values (seeds, prompts), however many prompts one has.

    A conversation's is the mean and, in proportion to its prompts, by how much these differ from it.
    """
    clusters = clusters_of(prompts, len(prompts))
    count = int(clusters.max()) + 1
    if count == len(prompts):
        return values
    mean = values.mean()
    sums = np.stack([np.bincount(clusters, weights=row - mean) for row in values])
    return mean + sums * count / len(prompts)


def _two_way_interval(values: np.ndarray, level: float) -> Interval:
    """Interval of the mean of values (seeds, prompts) that covers both; see `join_seeds`."""
    seeds, prompts = values.shape
    mean, by_seed, by_prompt = values.mean(), values.mean(axis=1), values.mean(axis=0)
    rest = values - by_seed[:, None] - by_prompt[None, :] + mean
    free = np.array([seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1)])
    squares = np.array(
        [prompts * ((by_seed - mean) ** 2).sum(), seeds * ((by_prompt - mean) ** 2).sum(), (rest**2).sum()]
    )
    ms_seed, ms_prompt, ms_rest = mean_squares = squares / free
    total = ms_rest + max(ms_seed - ms_rest, 0.0) + max(ms_prompt - ms_rest, 0.0)
    if total == 0.0:
        return Interval(float(mean), float(mean))
    freedom = total**2 / (mean_squares**2 / free).sum()
    return students_interval(mean, total / (seeds * prompts), freedom, level)
