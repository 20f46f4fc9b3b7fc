"""The embedded world's own reward as judge, in the shape of the others.

This module knows what the reward says of a response and of two. The rules behind it are `epsdpo.world.language`'s.
"""

from typing import Any

from epsdpo.evaluation.judges.answers import second_wins_by_rewards
from epsdpo.evaluation.judges.comparison import Answer, Deliver, Presentation
from epsdpo.world.language import followed_rules, gold_reward, parse_instruction

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

    def answer(self, presentations: list[Presentation], deliver: Deliver) -> None:
        """Score all; see `Judge`.

        Raises:
            ValueError: if an instruction is not one of the embedded world.
        """
        for number, item in enumerate(presentations):
            rewards = [gold_score(item.comparison.instruction, output) for output in (item.first, item.second)]
            deliver(number, Answer(second_wins_by_rewards(*rewards, self._temperature), {"rewards": rewards}))


def gold_score(instruction: str, response: str) -> float:
    """The gold reward of a response to an instruction, both as texts.

    Raises:
        ValueError: if the instruction is not one of the embedded world.
    """
    return gold_reward(parse_instruction(instruction), response)


def follows_every_rule(instruction: str, response: str) -> bool:
    """Whether a response does all that the instruction asks for, however many words it takes."""
    return all(followed_rules(parse_instruction(instruction), response).values())
