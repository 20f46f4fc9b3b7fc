"""Asking: which prompts have no response yet, in what order they are asked, and how far it has come.

This module knows the store and what every engine can do. How an engine decodes is the engine's own.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from epsdpo.data.rendering import RenderedPrompt
from epsdpo.models.kept import ResponseStore, response_key
from epsdpo.models.response import GenerationError, Response

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PROGRESS_LINES = 5.0


class Engine(Protocol):
    """Something that answers prompts.

    Attributes:
        made_by: everything but the prompt that decides a response: engine, model, decoding, seed. It must be equal
            where responses would be, also after a restart.
    """

    made_by: dict[str, Any]

    def answers(self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]) -> Iterator[dict[int, Response]]:
        """Responses to all `missing` prompts, by index, a few at a time; it may also answer some that are not."""
        ...


def respond(prompts: Sequence[RenderedPrompt], engine: Engine, store: ResponseStore, who: str) -> list[Response]:
    """One response to each prompt, in their order, taken from the store or asked for and put there.

    A prompt that occurs twice is asked once. Stopped at any moment and called again, it goes on where it was and comes
    to the same responses: what decides them is in the prompt and the engine, not in what else was asked before.

    Args:
        who: whose responses they are, for the lines of progress.

    Raises:
        GenerationError: if the engine leaves prompts unanswered. Those that it answered are in the store.
    """
    keys = [response_key(engine.made_by, prompt.token_ids) for prompt in prompts]
    distinct = dict(zip(keys, prompts, strict=True))
    missing = [key not in store.responses for key in distinct]
    if len(distinct) > sum(missing):
        logger.info("%s: %d of %d prompts are answered already", who, len(distinct) - sum(missing), len(distinct))
    if any(missing):
        _ask(list(distinct.values()), missing, engine, store, who)
    unanswered = sum(key not in store.responses for key in distinct)
    if unanswered:
        raise GenerationError(f"{who}: {unanswered} of {len(distinct)} prompts have no response")
    return [store.responses[key] for key in keys]


def _ask(prompts: list[RenderedPrompt], missing: list[bool], engine: Engine, store: ResponseStore, who: str) -> None:
    started = reported = time.monotonic()
    done, total = 0, sum(missing)
    for answered in engine.answers(prompts, missing):
        store.add(engine.made_by, [(prompts[index], response) for index, response in answered.items()])
        done += sum(missing[index] for index in answered)
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_PROGRESS_LINES or done == total:
            remaining = (now - started) / max(done, 1) * (total - done)
            logger.info("%s: answered %d of %d prompts, about %.0f s left", who, done, total, remaining)
            reported = now
