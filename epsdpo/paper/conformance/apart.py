"""When two trainings are one, up to rounding, and which rules for β a step can have followed."""

import math
from typing import NamedTuple

from epsdpo.paper.conformance.observed import Run

RULES = {"mean_step": "β/(1 + ε·mean step), the released code's", "mean_beta": "the mean of β̃, Algorithm 1's"}

# What float32 may leave between two ways to one number: a loss in nats, β relative to itself, a weight relative to the
# largest change of any in its tensor.
LOSS, BETA, WEIGHT = 2e-5, 2e-6, 1e-3


class Apart(NamedTuple):
    """The first step at which two trainings differ, and in what."""

    step: int
    text: str


def first_apart(expected: Run, found: Run, first: int = 1) -> Apart | None:
    """Compare β before each step from `first` on, its loss, and β and weights after it, as far as both have them."""
    for step in (each for each in sorted(expected.loss) if each >= first):
        after = step + 1
        for name, one, other, relative in (
            ("β before it", expected.beta.get(step), found.beta.get(step), BETA),
            ("a loss", expected.loss[step], found.loss.get(step, math.nan), 0.0),
            ("β after it", expected.beta.get(after), found.beta.get(after), BETA),
        ):
            if one is not None and other is not None and not abs(other - one) <= (relative * one or LOSS):
                return Apart(step, f"step {step}: expected {name} of {one:.8g}, found {other:.8g}")
        for name, weight in expected.weights.get(after, {}).items() if after in found.weights else ():
            change = (weight - expected.weights[step][name]).abs().max()
            distance = (found.weights[after][name] - weight).abs().max()
            if distance > WEIGHT * change:
                return Apart(step, f"step {step}: expected other weights after it, {name} is {distance:.2g} apart")
    return None


def fits(factor: float, pairs: int, epsilon: float, rule: str) -> bool:
    """Whether β can have changed by `factor` in a step of so many pairs, for some number of them on either side."""
    for relaxed in range(pairs + 1):
        for tightened in range(pairs + 1 - relaxed):
            tied = pairs - relaxed - tightened
            expected = pairs / (pairs + epsilon * (relaxed - tightened))
            if rule == "mean_beta":
                expected = (relaxed / (1 + epsilon) + tightened / (1 - epsilon) + tied) / pairs
            if abs(factor / expected - 1) < BETA:
                return True
    return False
