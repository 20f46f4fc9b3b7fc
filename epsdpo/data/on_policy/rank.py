"""What scores responses: a reward model, or the embedded world's gold reward.

This module knows how a conversation becomes a score. Keeping scores is left to `epsdpo.data.on_policy.scores`, what
they decide to `epsdpo.data.on_policy.pairs`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import AutoModelForSequenceClassification

from epsdpo.data.rows import Messages
from epsdpo.evaluation.judges.gold import gold_score
from epsdpo.experiment import WORLD, ConfigError, RankerSection
from epsdpo.models.batches import batches, padded, render, told
from epsdpo.models.weights import context_of, load_judge_model

_SECTION = "data.on_policy.ranker"


class Answered(NamedTuple):
    """A conversation that ends with the user, and a response to it."""

    messages: Messages
    response: str


class Ranker(Protocol):
    """Something that scores responses; higher is better.

    Attributes:
        made_by: everything but the response that decides a score.
    """

    made_by: dict[str, Any]

    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """Scores of all `missing` responses, by index, a few at a time; None for what cannot be scored."""
        ...


def load_ranker(section: RankerSection) -> Ranker:
    """The ranker that a config names.

    Raises:
        JudgeError, ConfigError: if it cannot be loaded, or is no reward model.
    """
    return GoldRanker() if section.model == WORLD else RewardModelRanker(section)


class GoldRanker:
    """The reward that the embedded world's instructions state themselves."""

    made_by = {"ranker": WORLD}

    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """All at once; see `Ranker`."""
        yield {
            number: gold_score(item.messages[-1]["content"], item.response)
            for number, item in enumerate(answered)
            if missing[number]
        }


class RewardModelRanker:
    """A sequence classifier with one label, whose logit is the score."""

    def __init__(self, section: RankerSection):
        self._model, self._tokenizer, weights = load_judge_model(AutoModelForSequenceClassification, section, _SECTION)
        if self._model.config.num_labels != 1:
            raise ConfigError(
                f"{_SECTION}.model: {section.model!r} has {self._model.config.num_labels} labels; a reward model "
                "has one"
            )
        self.made_by = {
            "ranker": "reward_model",
            "weights": weights,
            "dtype": section.dtype,
            **told(self._tokenizer),
        }
        self._batch_size = section.batch_size
        # The classifier finds the last token of each row of a batch by what is not padding.
        pad = self._tokenizer.pad_token_id
        self._pad = self._tokenizer.eos_token_id if pad is None else pad
        self._model.config.get_text_config().pad_token_id = self._pad

    @torch.inference_mode()
    def scores(self, answered: Sequence[Answered], missing: Sequence[bool]) -> Iterator[dict[int, float | None]]:
        """Batch by batch; see `Ranker`. What does not fit into the model's context has no score.

        The batches are those of all responses, so that after a restart not even rounding differs.
        """
        encoded = [self._encode(item) for item in answered]
        context = context_of(self._model)
        for members in batches([len(ids) for ids in encoded], self._batch_size):
            if not any(missing[number] for number in members):
                continue
            fitting = [number for number in members if context is None or len(encoded[number]) <= context]
            found: dict[int, float | None] = dict.fromkeys(members)
            if fitting:
                ids, mask = padded([encoded[number] for number in fitting], self._pad, side="right")
                device = self._model.device
                logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
                values = logits.double().view(-1).tolist()
                found |= {n: s if math.isfinite(s) else None for n, s in zip(fitting, values, strict=True)}
            yield found

    def _encode(self, item: Answered) -> list[int]:
        """The exchange by the model's chat template; one without a template reads prompt and response as a pair."""
        if self._tokenizer.chat_template is None:
            prompt = "\n\n".join(message.get("content", "") for message in item.messages)
            return self._tokenizer(prompt, item.response)["input_ids"]
        messages = [*item.messages, {"role": "assistant", "content": item.response}]
        return render(self._tokenizer, messages, answer_next=False)
