"""A reward model as judge: a sequence classifier with one label scores each output by itself.

This module knows how two rewards become a preference, by the Bradley-Terry model under which such models are trained.
"""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epsdpo.evaluation.judges.answers import second_wins_by_rewards
from epsdpo.evaluation.judges.comparison import Answer, Deliver, Failure, JudgeError, Presentation
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.batches import batches, padded, render, told
from epsdpo.models.weights import context_of


class RewardModelJudge:
    """Preference 1 + σ(reward of the model's output - reward of the reference's)."""

    order = "none"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: str, settings: JudgeSection
    ):
        """`weights` names model and tokenizer uniquely; see `weights_name`.

        Raises:
            JudgeError: if the classifier has more than one label.
        """
        if model.config.num_labels != 1:
            raise JudgeError(
                f"evaluate.judge.model: {settings.model!r} has {model.config.num_labels} labels; a reward model has one"
            )
        self.name = settings.model
        self._model, self._tokenizer, self._weights, self._settings = model, tokenizer, weights, settings
        # The classifier finds the last token of each row of a batch by what is not padding.
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        model.config.get_text_config().pad_token_id = self._pad

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The texts and what scores them."""
        return {
            "judge": "reward_model",
            "weights": self._weights,
            "dtype": self._settings.dtype,
            **told(self._tokenizer),
            "instruction": presentation.comparison.instruction,
            "outputs": [presentation.first, presentation.second],
        }

    @torch.inference_mode()
    def answer(self, presentations: list[Presentation], deliver: Deliver) -> None:
        """Score all, in batches of whole comparisons; see `Judge`. What does not fit into the context fails."""
        encoded = [[self._encode(item, output) for output in (item.first, item.second)] for item in presentations]
        longest = [max(map(len, pair)) for pair in encoded]
        context = context_of(self._model)
        for members in batches(longest, self._settings.batch_size):
            fitting = [number for number in members if context is None or longest[number] <= context]
            for number in set(members) - set(fitting):
                detail = f"{longest[number]} tokens, the model reads {context}"
                deliver(number, Failure("longer than the judge's context", detail))
            if not fitting:
                continue
            ids, mask = padded([ids for number in fitting for ids in encoded[number]], self._pad, side="right")
            device = self._model.device
            rewards = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            for number, pair in zip(fitting, rewards.double().view(-1, 2).tolist(), strict=True):
                second_wins = second_wins_by_rewards(*pair, temperature=1.0)
                deliver(number, Answer(second_wins, {"rewards": pair}))

    def _encode(self, presentation: Presentation, output: str) -> list[int]:
        """The exchange by the model's chat template; one without a template reads question and answer as a pair."""
        instruction = presentation.comparison.instruction
        if self._tokenizer.chat_template is None:
            return self._tokenizer(instruction, output)["input_ids"]
        messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
        return render(self._tokenizer, messages, answer_next=False)
