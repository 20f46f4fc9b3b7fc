"""The trainings of an implementation that the clauses are read from."""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from epsdpo.paper.conformance.apart import Apart, first_apart
from epsdpo.paper.conformance.observed import Run, Setting, train
from epsdpo.paper.conformance.subject import Subject

SHORT, FULL, MICRO = 3, 6, 3  # pairs of the last window, of the others, and of a micro-batch


class Trainings:
    """Trainings of one implementation. Two are made at once, which all clauses read; what these raise is not caught.

    Attributes:
        one_by_one: a step for each pair, in which the weights rest.
        whole: windows of six pairs, each one batch, in which weights and β move.
        factors: by what each pair multiplies β in its own loss.
        sees_beta: whether the trainer's attribute is the β of its losses.
    """

    def __init__(self, subject: Subject, vectors: dict[str, Any], folder: Path):
        self.subject, self.vectors, self.folder = subject, vectors, folder
        self.beta, self.epsilon = vectors["arguments"]["beta"], vectors["arguments"]["epsilon"]
        self.alone, self.all = vectors["one_by_one"], range(len(vectors["pairs"]))
        self.factor_of = {1: 1 / (1 + self.epsilon), 0: 1.0, -1: 1 / (1 - self.epsilon)}
        self.sees_beta = True
        self.one_by_one = self.train("one-by-one", Setting(self.all, 1))
        self.factors, self.sees_beta = self._factors()
        self.whole = self.train("whole", learning(vectors))

    def train(self, name: str, setting: Setting) -> Run:
        run = train(self.subject, self.vectors, setting, self.folder / name)
        if not self.sees_beta:
            run.beta.clear()
        return run

    @cached_property
    def window_apart(self) -> Apart | None:
        """Where windows of micro-batches differ from whole ones, each second of which is a shorter last one."""
        pairs = self.all[: FULL + SHORT]
        batches = self.train("batches", learning(self.vectors, pairs=pairs, epochs=2))
        setting = learning(self.vectors, batch=MICRO, accumulation=FULL // MICRO, pairs=pairs, epochs=2)
        return first_apart(batches, self.train("micro-batches", setting))

    def _factors(self) -> tuple[list[float], bool]:
        # A pair starts from the trainer's β if that explains the losses, else from one that moves as it should or rests
        # (which is what a trainer does whose β lies elsewhere, or never moves).
        betas = [_beta(*each) for each in zip(self.one_by_one.loss.values(), self.alone["margin"], strict=True)]
        seen = list(self.one_by_one.beta.values())[:-1]
        starts = [each for each in (seen, [self.beta, *betas[:-1]], [self.beta] * len(betas)) if each]
        every = [[beta / start for beta, start in zip(betas, each, strict=True)] for each in starts]
        explaining = [each for each in every if None not in map(self.decision_of, each)]
        factors = explaining[0] if explaining else every[0]
        return factors, bool(seen) and factors is every[0]

    def decision_of(self, factor: float) -> int | None:
        return next((way for way, expected in self.factor_of.items() if abs(factor / expected - 1) < 1e-4), None)


def learning(vectors: dict[str, Any], batch: int = FULL, epochs: int = 3, **more: Any) -> Setting:
    """A training in which the weights move; of all pairs where no others are named."""
    rate, pairs = vectors["arguments"]["learning_rate"], range(len(vectors["pairs"]))
    return Setting(**{"pairs": pairs, "batch": batch, "epochs": epochs, "learning_rate": rate, **more})


def _beta(loss: float, margin: float) -> float:
    """β̃ from -log σ(β̃·margin)."""
    return -math.log(math.expm1(loss)) / margin if loss > 0 else math.nan
