"""A reward model: a sequence classifier with one label, whose logit says how good the end of a conversation is."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from epsdpo.experiment import ConfigError, RankerSection
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.beside import Messages
from epsdpo.models.batches import batches, chat_ids, padded, told
from epsdpo.models.weights import context_of, load_scoring_model


class RewardModel:
    """The model that a config names.

    Attributes:
        made_by: weights, precision and what else decides a reward beside the texts.
        context: how many tokens it reads at most; None where it does not say.
    """

    def __init__(self, settings: JudgeSection | RankerSection, section: str):
        """
        Args:
            settings: model, revision, dtype and batch_size.
            section: where a config states them, for messages.

        Raises:
            ConfigError: if it cannot be loaded, or has more than one label.
        """
        self._model, self._tokenizer, weights = load_scoring_model(
            AutoModelForSequenceClassification, settings, section
        )
        if (labels := self._model.config.num_labels) != 1:
            raise ConfigError(f"{section}.model: {settings.model!r} has {labels} labels; a reward model has one")
        self.made_by: dict[str, Any] = {"weights": weights, "dtype": settings.dtype, **told(self._tokenizer)}
        self.context = context_of(self._model)
        self._batch_size = settings.batch_size
        # The classifier finds the last token of each row of a batch by what is not padding.
        pad = self._tokenizer.pad_token_id
        self._pad = self._tokenizer.eos_token_id if pad is None else pad
        self._model.config.get_text_config().pad_token_id = self._pad

    def encode(self, messages: Messages, response: str) -> list[int]:
        """The exchange by the model's chat template; one without a template reads prompt and response as a pair."""
        if self._tokenizer.chat_template is None:
            prompt = "\n\n".join(message.get("content", "") for message in messages)
            return self._tokenizer(prompt, response)["input_ids"]
        return chat_ids(self._tokenizer, [*messages, {"role": "assistant", "content": response}], answer_next=False)

    @torch.inference_mode()
    def rewards(
        self, groups: Sequence[list[list[int]]], missing: Sequence[bool]
    ) -> Iterator[dict[int, list[float] | None]]:
        """Rewards of the token ids in each group, by its index, batch by batch; None where one exceeds the context.

        A batch holds whole groups. The batches are those of all groups, so that after a restart not even rounding
        differs; those of which none is missing are left out.
        """
        longest = [max(map(len, group)) for group in groups]
        for members in batches(longest, self._batch_size):
            if not any(missing[number] for number in members):
                continue
            fitting = [number for number in members if self.context is None or longest[number] <= self.context]
            found: dict[int, list[float] | None] = dict.fromkeys(members)
            if fitting:
                ids, mask = padded([ids for number in fitting for ids in groups[number]], self._pad, side="right")
                device = self._model.device
                logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                values = iter(logits.double().view(-1).tolist())
                found |= {number: [next(values) for _ in groups[number]] for number in fitting}
            yield found
