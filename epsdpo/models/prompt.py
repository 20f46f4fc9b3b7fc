"""A prompt as a model reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from epsdpo.methods.beside import Messages


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it.

    Attributes:
        messages: the conversation.
        text: the conversation through the chat template, up to the header of the assistant's turn.
        token_ids: of `text`.
        bos: how many BOS the ids start with.
        variables: what else the template was told: tools, documents and settings of the prompt's own.
    """

    messages: Messages
    text: str
    token_ids: list[int]
    bos: int
    variables: Mapping[str, Any] = field(default_factory=dict)
