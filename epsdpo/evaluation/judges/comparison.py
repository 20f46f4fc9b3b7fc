"""A comparison, the order in which a judge sees it, and what comes back: AlpacaEval's protocol."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from epsdpo.models.response import Failure

Order = Literal["seeded", "both", "none"]


class JudgeError(RuntimeError):
    """The judge cannot be asked at all. The message names the place and the remedy."""


@dataclass(frozen=True)
class Comparison:
    """An instruction and the two outputs to compare."""

    instruction: str
    reference_output: str
    model_output: str

    @property
    def identical(self) -> bool:
        """Such outputs are a draw, whatever a judge would say."""
        return self.reference_output == self.model_output


@dataclass(frozen=True)
class Presentation:
    """A comparison as a judge sees it: the reference's output first or, switched, the model's."""

    comparison: Comparison
    switched: bool

    @property
    def first(self) -> str:
        return self.comparison.model_output if self.switched else self.comparison.reference_output

    @property
    def second(self) -> str:
        return self.comparison.reference_output if self.switched else self.comparison.model_output

    def preference(self, second_wins: float) -> float:
        """P(the second output is better) as AlpacaEval's preference: 1 = the reference wins, 2 = the model wins."""
        return 2.0 - second_wins if self.switched else 1.0 + second_wins


@dataclass(frozen=True)
class Answer:
    """What a judge said about one presentation.

    Attributes:
        second_wins: P(the second output is better), in [0, 1].
        evidence: what it was read from, as JSON: log-probabilities, text, rewards.
        usage: `prompt_tokens` and `completion_tokens` as the server counted them, where it did.
        served_model: what the server says answered, which may change behind one name.
    """

    second_wins: float
    evidence: dict[str, Any]
    usage: dict[str, int] = field(default_factory=dict)
    served_model: str | None = None


@dataclass(frozen=True)
class Judgement:
    """What came of one comparison.

    Attributes:
        preference: in [1, 2] as AlpacaEval has it; None if the judge gave no answer, or only in one of two orders.
        records: what is stored of each answer, by which order the presentation had: False = not switched.
        failure: the first one, where there is no preference.
    """

    preference: float | None
    records: dict[bool, dict[str, Any]]
    failure: Failure | None = None


class Judge(Protocol):
    """Whoever can be asked which of two outputs is better.

    Attributes:
        name: how annotations and reports call it.
        order: "none" for a judge that does not see the outputs in an order.
    """

    name: str
    order: Order

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """All that the answer depends on, as JSON: the same request is asked once."""

    def answers(
        self, presentations: Sequence[Presentation], missing: Sequence[bool]
    ) -> Iterator[dict[int, Answer | Failure]]:
        """Answers about all `missing` presentations, by index, a few at a time; it may also answer some that are not.

        Raises:
            JudgeError: if there is no point in asking on. What was answered stands.
        """
        ...


def is_switched(instruction: str) -> bool:
    """Whether AlpacaEval shows the model's output first for this instruction."""
    return random.Random(f"is_switched_outputs{instruction}0").choices([False, True])[0]


def presentations(comparison: Comparison, order: Order) -> list[Presentation]:
    """How a judge sees a comparison; identical outputs are not shown to any."""
    if comparison.identical:
        return []
    switches = {"none": [False], "seeded": [is_switched(comparison.instruction)], "both": [False, True]}[order]
    return [Presentation(comparison, switched) for switched in switches]
