"""A reward model as judge: two rewards become a preference by the Bradley-Terry model under which such are trained."""

from collections.abc import Iterator, Sequence
from typing import Any

from epsdpo.evaluation.judges.answers import second_wins_by_rewards
from epsdpo.evaluation.judges.comparison import Answer, Presentation
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.response import Failure
from epsdpo.models.reward_model import RewardModel


class RewardModelJudge:
    """Preference 1 + σ(reward of the model's output - reward of the reference's)."""

    order = "none"

    def __init__(self, settings: JudgeSection):
        """
        Raises:
            ConfigError: if the model cannot be loaded, or has more than one label.
        """
        self.name = settings.model
        self._model = RewardModel(settings, "evaluate.judge")

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The texts and what scores them."""
        return {
            "judge": "reward_model",
            **self._model.made_by,
            "instruction": presentation.comparison.instruction,
            "outputs": [presentation.first, presentation.second],
        }

    def answers(
        self, presentations: Sequence[Presentation], missing: Sequence[bool]
    ) -> Iterator[dict[int, Answer | Failure]]:
        """Scores, in batches of whole comparisons; see `Judge`. What does not fit into the context fails."""
        encoded = [[self._encode(item, output) for output in (item.first, item.second)] for item in presentations]
        for found in self._model.rewards(encoded, missing):
            answers: dict[int, Answer | Failure] = {}
            for number, pair in found.items():
                if pair is None:
                    detail = f"{max(map(len, encoded[number]))} tokens, the model reads {self._model.context}"
                    answers[number] = Failure("longer than the judge's context", detail)
                else:
                    answers[number] = Answer(second_wins_by_rewards(*pair, temperature=1.0), {"rewards": pair})
            yield answers

    def _encode(self, presentation: Presentation, output: str) -> list[int]:
        return self._model.encode([{"role": "user", "content": presentation.comparison.instruction}], output)
