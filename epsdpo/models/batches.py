"""Conversations as token ids for models that run here, and batches of them."""

from collections.abc import Iterator
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from epsdpo.experiment import TEMPLATE_DATE
from epsdpo.methods.chat_template import render_chat, writes_date


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer_next: bool) -> list[int]:
    """Token ids by the model's chat template; one without a system role gets that text in the user's message.

    A template that asks for today's date is told the same day always.

    Args:
        answer_next: whether the model's answer is to follow.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    try:
        text = render_chat(messages, tokenizer, TEMPLATE_DATE, answer_next=answer_next)
    except TemplateError:
        if messages[0]["role"] != "system":
            raise
        system, user, *rest = messages
        user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        text = render_chat([user, *rest], tokenizer, TEMPLATE_DATE, answer_next=answer_next)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def told(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids beside the conversation and the tokenizer; empty for templates that ask for nothing."""
    return {"template_date": TEMPLATE_DATE} if writes_date(tokenizer) else {}


def batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: if memory does not suffice, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(sequences: list[list[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (sequences, longest), filled up on the "left" or the "right"."""
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    mask = [torch.ones_like(sequence) for sequence in ids]
    return (
        pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side),
        pad_sequence(mask, batch_first=True, padding_side=side),
    )
