"""The embedded world's own reward as judge, in the shape of the others.

The reward and its preference are `epsdpo.evaluation.judge`'s.
"""

from typing import Any

from epsdpo.evaluation.judge import GOLD_JUDGE, gold_judge, preference
from epsdpo.judging.comparison import Answer, Deliver, Presentation


class GoldJudge:
    """Scores each output by the rules of its instruction; sees no order, never fails, costs nothing."""

    name = GOLD_JUDGE
    order = "none"

    def __init__(self, temperature: float):
        """`temperature` is that of the world's labels, in units of gold reward."""
        self._temperature = temperature

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The texts and the temperature."""
        return {
            "judge": GOLD_JUDGE,
            "temperature": self._temperature,
            "instruction": presentation.comparison.instruction,
            "outputs": [presentation.first, presentation.second],
        }

    def answer(self, presentations: list[Presentation], deliver: Deliver) -> None:
        """Score all; see `Judge`.

        Raises:
            ValueError: if an instruction is not one of the embedded world.
        """
        for number, item in enumerate(presentations):
            rewards = [gold_judge(item.comparison.instruction, output) for output in (item.first, item.second)]
            deliver(number, Answer(preference(*rewards, self._temperature) - 1.0, {"rewards": rewards}))
