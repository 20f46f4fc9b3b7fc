"""The embedded world's own reward as judge, in the shape of the others."""

from collections.abc import Iterator, Sequence
from typing import Any

from epsdpo.evaluation.judges.answers import second_wins_by_rewards
from epsdpo.evaluation.judges.comparison import Answer, Presentation
from epsdpo.world.language import gold_score

GOLD_JUDGE = "gold"


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

    def answers(self, presentations: Sequence[Presentation], missing: Sequence[bool]) -> Iterator[dict[int, Answer]]:
        """One by one; see `Judge`.

        Raises:
            ValueError: if an instruction is not one of the embedded world.
        """
        for number, item in enumerate(presentations):
            rewards = [gold_score(item.comparison.instruction, output) for output in (item.first, item.second)]
            yield {number: Answer(second_wins_by_rewards(*rewards, self._temperature), {"rewards": rewards})}
