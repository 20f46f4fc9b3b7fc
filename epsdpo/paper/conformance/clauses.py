"""What the paper says, clause by clause, asked of an implementation by trainings on the vectors.

Only losses, β and weights are looked at. Where a clause says that something must not matter, the implementation is held
against itself, so that a fault is found where it lies and not wherever it is felt.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from epsdpo.paper.conformance.apart import BETA, LOSS, RULES, WEIGHT, first_apart, fits
from epsdpo.paper.conformance.observed import Run, Setting
from epsdpo.paper.conformance.subject import Subject
from epsdpo.paper.conformance.trainings import FULL, MICRO, SHORT, Trainings, learning

HOLDS, BROKEN, NOT_ASKED = "holds", "broken", "could not be asked"


class Answer(NamedTuple):
    clause: str
    source: str
    verdict: str
    detail: str


class Broken(Exception):
    """A clause that is broken; says where, what was expected and what was found."""


class NotAsked(Exception):
    """A clause that could not be asked; says why, and what would help."""


class Examination(Trainings):
    """The clauses, each a method that says how it holds, or raises `Broken` or `NotAsked`."""

    def __init__(self, subject: Subject, vectors: dict[str, Any], folder: Path):
        super().__init__(subject, vectors, folder)
        self.verdicts: dict[str, str] = {}

    def answers(self) -> Iterator[Answer]:
        """Each clause in turn; what the implementation raises is an answer too."""
        for clause, source, question in (
            ("decisions", "Eqs. 3 to 5", self.decisions),
            ("β̃ of a pair", "Eq. 5", self.pair_beta),
            ("loss of a batch", "Algorithm 1, line 5", self.loss),
            ("β over steps", "Algorithm 1, line 5", self.path),
            ("accumulation", "Algorithm 1, line 5", self.accumulation),
            ("short last window", "Algorithm 1, line 5", self.short_window),
            ("evaluation", "Algorithm 1", self.evaluation),
            ("resuming", "Algorithm 1", self.resuming),
            ("ties", "Eq. 5, strict", self.ties),
            ("precomputed reference", "Eqs. 3 and 4", self.precomputed),
        ):
            yield self.ask(clause, source, question)

    def ask(self, clause: str, source: str, question: Callable[[], str]) -> Answer:
        try:
            verdict, detail = HOLDS, question()
        except Broken as broken:
            verdict, detail = BROKEN, str(broken)
        except NotAsked as why:
            verdict, detail = NOT_ASKED, str(why)
        except Exception as error:  # of somebody's code, which may raise anything
            verdict, detail = NOT_ASKED, f"the training failed: {_told(error)}"
        self.verdicts[clause] = verdict
        return Answer(clause, source, verdict, detail)

    def decisions(self) -> str:
        found = list(map(self.decision_of, self.factors))
        if None in found:  # the loss does not tell
            found = [self.decision_of(after / before) for before, after in pairwise(self.one_by_one.beta.values())]
            if not found or None in found:
                raise NotAsked("neither the loss of a pair nor β after it tells its β̃; see the next lines")
        for pair, (expected, decision) in enumerate(zip(self.alone["decision"], found, strict=True)):
            if decision != expected:
                lowered, raised = (self.alone["log_ratio"][pair][k] - self.alone["log_ratio"][pair][0] for k in (1, 2))
                raise Broken(
                    f"pair {pair}: expected {_way(expected)}, found {_way(decision)}; its log-ratio changes by "
                    f"{lowered:+.3g} nats where β is lowered and by {raised:+.3g} where it is raised"
                )
        return f"{len(found)} of {len(found)} pairs"

    def pair_beta(self) -> str:
        if None not in map(self.decision_of, self.factors):
            return "β/(1 + ε), β, β/(1 - ε)"
        for way, name in ((1, "β/(1 + ε)"), (-1, "β/(1 - ε)"), (0, "β")):
            of_way = [self.factors[pair] for pair in self.all if self.alone["decision"][pair] == way]
            if max(of_way) - min(of_way) > 1e-3:
                raise NotAsked("it is read from the loss of a pair, which is no -log σ(β̃·margin); see the next line")
            if self.decision_of(of_way[0]) != way:
                wrong = self.alone["decision"].index(way), name, self.factor_of[way], of_way[0]
        raise Broken("pair {}: expected {} = {:.6g}·β, found {:.6g}·β".format(*wrong))

    def loss(self) -> str:
        if self.verdicts["β̃ of a pair"] == NOT_ASKED:
            raise Broken(self._wrong_loss())
        betas = [self.beta * factor for factor in self.factors[:FULL]]
        expected = sum(map(_loss, betas, self.alone["margin"])) / FULL
        if not abs(self.whole.loss[1] - expected) <= LOSS:
            raise Broken(f"step 1: expected {expected:.6g}, the mean over its pairs, found {self.whole.loss[1]:.6g}")
        if BROKEN in (self.verdicts["decisions"], self.verdicts["β̃ of a pair"]):
            return "the mean over its pairs; its gradient was not asked, as other β̃ have another"
        for name, weight in self.vectors["weights_after_first_step"].items():
            before, found = self.whole.weights[1][name], self.whole.weights[2][name]
            expected = found.new_tensor(weight)
            apart, change = (found - expected).abs().max(), (expected - before).abs().max()
            if apart > WEIGHT * change:
                raise Broken(
                    f"step 1: the loss is right and its gradient is not: {name} is {apart:.2g} from what it should be, "
                    f"after a change of {change:.2g}. β̃ is a constant, and only the policy itself has a gradient"
                )
        return "the mean over its pairs; β̃ is a constant in its gradient"

    def _wrong_loss(self) -> str:
        beta = self.beta
        for pair, (decision, margin) in enumerate(zip(self.alone["decision"], self.alone["margin"], strict=True)):
            beta, found = beta * self.factor_of[decision], self.one_by_one.loss[pair + 1]  # a step of one pair
            if abs(found - _loss(beta, margin)) > LOSS:
                break
        current, lowered, raised = self.alone["log_ratio"][pair]
        perturbed = margin + {1: lowered, -1: raised, 0: current}[decision] - current
        text = f"pair {pair}: expected {_loss(beta, margin):.6g}, found {found:.6g}"
        if abs(found - _loss(beta, perturbed)) < LOSS:
            text += ", in which the perturbed policy of Eqs. 3 and 4 stands for the policy"
        return text

    def path(self) -> str:
        rules = self._rules(self.whole, FULL, RULES) if self.whole.beta else list(RULES)
        asked = "losses and β" if self.whole.beta else "losses"
        if all(self.verdicts[clause] == HOLDS for clause in ("decisions", "β̃ of a pair", "loss of a batch")):
            wrong = {rule: first_apart(self._expected(rule), self.whole) for rule in rules}
            rules = [rule for rule in rules if wrong[rule] is None]
            if not rules:
                raise Broken("; ".join(f"{apart.text} by {RULES[rule]}" for rule, apart in wrong.items()))
        elif not self.whole.beta:
            raise NotAsked(f"its losses are others, and β is not seen. {self._name_beta()}")
        else:
            asked = "β, of whatever decisions"
        if self.whole.beta:
            # Models in bfloat16, and three pairs in a step: a mean of thirds that is made in bfloat16 has 8 bits.
            rounded = self.train("thirds", Setting(self.all, MICRO, dtype=torch.bfloat16))
            self._rules(rounded, MICRO, rules)
        return f"{' or '.join(RULES[rule] for rule in rules)}; {asked} over {len(self.whole.loss)} steps"

    def _rules(self, run: Run, pairs: int, rules: Iterable[str]) -> list[str]:
        """By which rules each step's β can have come from the last, for some number of pairs on either side."""
        left = list(rules)
        for step, (before, after) in enumerate(pairwise(run.beta.values()), start=1):
            fitting = [rule for rule in left if fits(after / before, pairs, self.epsilon, rule)]
            if not fitting:
                expected = ", nor ".join(RULES[rule] for rule in left)
                raise Broken(
                    f"step {step} of {pairs} pairs: β went from {before:.8g} to {after:.8g}, which is not {expected}, "
                    "whatever the pairs decide"
                )
            left = fitting
        return left

    def _expected(self, rule: str) -> Run:
        path = self.vectors["paths"][rule]
        return Run(*(dict(enumerate(path[name], start=1)) for name in ("loss", "beta")))

    def accumulation(self) -> str:
        if self.window_apart and self.window_apart.step % 2:
            raise Broken(f"{self.window_apart.text}, as in one batch of {FULL}; in micro-batches of {MICRO}")
        return f"{FULL // MICRO} micro-batches of {MICRO} pairs are one batch of {FULL}, and β moves once"

    def short_window(self) -> str:
        if self.verdicts["accumulation"] != HOLDS:
            raise NotAsked("windows of accumulation are wrong by themselves; see the line above")
        if self.window_apart:
            raise Broken(
                f"{self.window_apart.text}, as in one batch of {SHORT}; the window has {SHORT} of {FULL} pairs"
            )
        return f"a last window of {SHORT} of {FULL} pairs is averaged over its own"

    def evaluation(self) -> str:
        evaluated = self.train("evaluated", learning(self.vectors, evaluated=self.all[::-1][:FULL]))
        if apart := first_apart(self.whole, evaluated):
            raise Broken(f"{apart.text}, as without an evaluation after each step")
        return "after every step; losses, β and weights are as without"

    def resuming(self) -> str:
        last = len(self.whole.loss) // 2
        stopped = self.train("stopped", learning(self.vectors, stop_after=last))
        if stopped.checkpoint is None:
            raise NotAsked(f"no checkpoint-{last} was written in output_dir")
        resumed = self.train("stopped", learning(self.vectors, resume_from=stopped.checkpoint))
        if apart := first_apart(self.whole, resumed, first=last + 1):
            raise Broken(f"{apart.text}, as without the interruption after step {last}")
        return f"from the checkpoint of step {last}; losses, β and weights are as without"

    def ties(self) -> str:
        if not self.whole.beta or self.verdicts["β over steps"] == BROKEN:
            raise NotAsked(f"it is read from β, which is wrong or not seen. {self._name_beta()}")
        equal = self.train("equal", Setting(self.all, 1, policy="reference"))
        for step, (before, after) in enumerate(pairwise(equal.beta.values())):
            if abs(after / before - 1) > BETA:
                raise Broken(
                    f"pair {step}: policy and reference are equal, and so are the three log-ratios; found a step, by "
                    "comparisons that are not strict, or of rounding errors"
                )
        asked = self.vectors["rounded"]
        setting = Setting(asked["pairs"], 1, dtype=torch.bfloat16, args={self.subject.epsilon: asked["epsilon"]})
        ties = 0
        betas = pairwise(self.train("rounded", setting).beta.values())
        for pair, (before, after) in zip(asked["pairs"], betas, strict=True):
            expected = self.alone["decision"][pair]
            if (before - after) * expected < -BETA * before:
                raise Broken(f"pair {pair}, models in bfloat16: expected {_way(expected)} or a tie, found the opposite")
            ties += abs(after / before - 1) < BETA
        return (
            f"equal models tie; at ε = {asked['epsilon']} {ties} of {len(asked['pairs'])} pairs do, of models in "
            "bfloat16 (in exact arithmetic none, in bfloat16 throughout, as under the published launch, all)"
        )

    def precomputed(self) -> str:
        setting = learning(self.vectors, args={"precompute_ref_log_probs": True})
        try:
            run = self.train("precomputed", setting)
        except Exception as error:
            return f"precompute_ref_log_probs is refused: {_told(error)}"
        if apart := first_apart(self.whole, run):
            margins = self.alone["margin"][:FULL]
            dpo = sum(_loss(self.beta, margin) for margin in margins) / FULL
            plain = abs(run.loss[1] - dpo) < LOSS
            raise Broken(f"{apart.text}, as without it" + "; it is plain DPO's, of one β for all pairs" * plain)
        return "precompute_ref_log_probs changes nothing"

    def _name_beta(self) -> str:
        return f"The trainer's attribute is taken to be {self.subject.beta!r}; name it by `beta` in --config"


def _loss(beta: float, margin: float) -> float:
    """-log σ(β·margin)."""
    return math.log1p(math.exp(-beta * margin))


def _way(decision: int | None) -> str:
    return {1: "β⁻", 0: "β (a tie)", -1: "β⁺", None: "none of these"}[decision]


def _told(error: Exception) -> str:
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"
