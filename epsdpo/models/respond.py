"""Responses to prompts: taken from what is kept, or asked for and kept."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from epsdpo.models.kept import Kept, ask_missing
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.response import Failure, GenerationError, Response


class Engine(Protocol):
    """Something that answers prompts.

    Attributes:
        made_by: everything but the prompt that decides a response: engine, model, decoding, seed. It must be equal
            where responses would be, also after a restart.
    """

    made_by: dict[str, Any]

    def answers(
        self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]
    ) -> Iterator[dict[int, Response | Failure]]:
        """Responses to all `missing` prompts, by index, a few at a time; it may also answer some that are not."""
        ...


def kept_responses(path: Path) -> Kept:
    """Responses in a file, to be opened."""
    return Kept(path, _read)


def response_key(made_by: dict[str, Any], prompt_ids: list[int]) -> str:
    """sha256 over everything that decides a response: model, decoding and seed (`made_by`), and the prompt's tokens."""
    content = json.dumps({"made_by": made_by, "prompt_ids": prompt_ids}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def respond(prompts: Sequence[RenderedPrompt], engine: Engine, kept: Kept, who: str) -> list[Response]:
    """One response to each prompt, in their order; a prompt that occurs twice is asked once.

    However often it was stopped, it comes to the same responses: what decides them is in the prompt and the engine, not
    in what else was asked before.

    Args:
        kept: open, of `kept_responses`.
        who: whose responses they are, for the lines of progress.

    Raises:
        GenerationError: if the engine leaves prompts unanswered. Those that it answered are kept.
    """
    keys = [response_key(engine.made_by, prompt.token_ids) for prompt in prompts]

    def record(key: str, prompt: RenderedPrompt, response: Response) -> dict[str, Any]:
        return {
            "key": key,
            "made_by": engine.made_by,
            "prompt": prompt.text,
            "prompt_ids": prompt.token_ids,
            "bos": prompt.bos,
            "response": response.text,
            "token_ids": response.token_ids,
            "finished": response.finished,
        }

    failures = ask_missing(dict(zip(keys, prompts, strict=True)), kept, engine.answers, record, who)
    if unanswered := [key for key in dict.fromkeys(keys) if key not in kept]:
        first = failures.get(unanswered[0], Failure("never answered"))
        raise GenerationError(
            f"{who}: {len(unanswered)} of {len(set(keys))} prompts have no response, the first because of: {first}. "
            "The others are kept; run the same again to ask for these again"
        )
    return [kept[key] for key in keys]


def _read(record: dict[str, Any]) -> Response:
    if record["key"] != response_key(record["made_by"], record["prompt_ids"]):
        raise ValueError("its key is not that of its prompt and settings")
    return Response(record["response"], record["token_ids"], record["finished"])
