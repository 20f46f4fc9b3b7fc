"""The first step and quantity in which a run leaves its prediction intervals."""

from dataclasses import dataclass

from epsdpo.trajectory.same_run.bands import Bands, summary_interval
from epsdpo.trajectory.same_run.gold_files import Gold
from epsdpo.trajectory.same_run.quantities import KNOWN_BY_DATA, MEASURED, WORDS, RunNumbers

_SLACK = 0.02  # share of answers that may differ though the repeats' do not, where two words are nearly as likely


@dataclass(frozen=True)
class Departure:
    """Where a run is another.

    Attributes:
        step: the optimiser step; None for the evaluation.
        quantities: all that differ there, the one nearest to the cause first.
        words: what the first is, and what it should be.
    """

    step: int | None
    quantities: list[str]
    words: str


def first_departure(run: RunNumbers, bands: Bands) -> Departure | None:
    """Of the run's steps; None if all are within."""
    published = bands.peers[0].steps
    steps = run.steps.index.intersection(published.index)
    own = bands.own.loc[steps]
    outside = {name: own[name] != published.loc[steps, name] for name in bands.exact}
    for name in KNOWN_BY_DATA:
        if name in outside:
            outside[name] &= (own[name] != "") & (published.loc[steps, name] != "")
    for name in bands.low:
        low, high = bands.low.loc[steps, name], bands.high.loc[steps, name]
        outside[name] = (own[name] < low) | (own[name] > high)
    firsts = {name: steps[found.argmax()] for name, found in outside.items() if found.any()}
    if not firsts:
        if len(run.steps) == len(published):
            return None
        words = f"the run has {len(run.steps)} steps, the published one {len(published)}"
        return Departure(len(steps) + 1, ["pairs"], words)
    step = int(min(firsts.values()))
    there = [name for name in WORDS if firsts.get(name) == step]
    return Departure(step, there, _in_words(there[0], step, bands))


def evaluation_departure(run: RunNumbers, bands: Bands, gold: Gold) -> Departure | None:
    """Of the run's evaluation; None if all is within, or there is nothing to compare."""
    answered = [repeat.answers for repeat in bands.peers if len(repeat.answers) == len(run.answers)]
    if bands.same_data and run.answers and answered:  # else the reference is another model
        share = max(_alike(run.answers, answers) for answers in answered)
        others = [
            max(_alike(own, other) for other in answered if other is not own) for own in answered if len(answered) > 1
        ]
        least = min(others, default=1.0) - _SLACK
        if share < least:
            words = f"the reference gives {share:.1%} of the published answers, and should give {least:.1%}"
            return Departure(None, ["answers"], words)
    outside = []
    for name, value in run.summary.items():
        interval = summary_interval(name, bands, gold)
        if interval is not None and not interval[0] <= value <= interval[1]:
            outside.append((name, f"{name} is {value:.6g}, published {interval[0]:.6g} to {interval[1]:.6g}"))
    return Departure(None, [name for name, _ in outside], outside[0][1]) if outside else None


def _alike(one: list[str], other: list[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _in_words(name: str, step: int, bands: Bands) -> str:
    what, value = WORDS[name], bands.own.loc[step, name]
    if name in bands.low:
        low, high = bands.low.loc[step, name], bands.high.loc[step, name]
        first, *others = bands.steps_of(name, step)
        what += f", mean over steps {first} to {step}" if others else ""
        digits = 6 if high - low > 1e-5 * abs(high) else 10
        return f"{what}: {value:.{digits}g}, published {low:.{digits}g} to {high:.{digits}g}"
    published = bands.peers[0].steps.loc[step, name]
    return f"{what}: {value}, published {published}" if name in MEASURED or type(value) is not str else f"{what} differ"
