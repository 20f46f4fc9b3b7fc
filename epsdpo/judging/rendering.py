"""Conversations as token ids for judges that run here, and batches of them.

This module knows chat templates and padding. What a conversation says is left to the judges.
"""

from collections.abc import Iterator

import torch
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer_next: bool) -> list[int]:
    """Token ids by the model's chat template; one without a system role gets that text in the user's message.

    Args:
        answer_next: whether the model's answer is to follow.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, return_dict=True)
    except TemplateError:
        if messages[0]["role"] != "system":
            raise
        system, user, *rest = messages
        user = {**user, "content": f"{system['content']}\n\n{user['content']}"}
        encoded = tokenizer.apply_chat_template([user, *rest], add_generation_prompt=answer_next, return_dict=True)
    return list(encoded["input_ids"])


def batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, the longest first: if memory does not suffice, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def padded(sequences: list[list[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (sequences, longest), filled up on the "left" or the "right"."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence)
        mask[row, place] = 1
    return ids, mask
