"""What comes of a question, whoever was asked: a response or a failure; and the randomness that belongs to a prompt.

Apart from the engines, so that asking a server needs no torch.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np

_SHOWN = 300


class Decoding(Protocol):
    """How responses are decoded: a section `evaluate` or `data.on_policy` of a config, each key explained there."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_token_ids: list[int]
    batch_size: int


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        text: decoded without special tokens.
        token_ids: everything that was generated, the end token included.
        finished: whether the model ended the response; False if `max_new_tokens` cut it.
    """

    text: str
    token_ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    Attributes:
        reason: a few words, the same for failures of one kind.
        detail: what exactly came back.
        transient: whether asking again soon may help.
        status: with which a server refused, where one did.
    """

    reason: str
    detail: str = ""
    transient: bool = False
    status: int | None = None

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail[:_SHOWN]}" if self.detail else self.reason


class GenerationError(RuntimeError):
    """Prompts that could not be answered. What was answered is kept; the same call asks for the rest."""


def own_generator(prompt_ids: list[int], seed: int) -> np.random.Generator:
    """The prompt's own stream of random numbers, made from its token ids and the seed."""
    digest = hashlib.sha256(np.asarray(prompt_ids, dtype="<i8").tobytes()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()])


def own_seed(prompt_ids: list[int], seed: int) -> int:
    """A seed of 31 bits for engines that draw by themselves, so that no two prompts share their random numbers."""
    return int(own_generator(prompt_ids, seed).integers(2**31))
