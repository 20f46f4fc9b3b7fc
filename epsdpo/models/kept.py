"""Responses on disk: one JSON line each, appended when it is there, found again by what it is an answer to.

This module knows the file, its key and how a killed writer leaves it. Who answers is left to the engines.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from epsdpo.data.rendering import RenderedPrompt
from epsdpo.files import flush_to_disk
from epsdpo.models.response import Response

logger = logging.getLogger(__name__)


def response_key(made_by: dict[str, Any], prompt_ids: list[int]) -> str:
    """sha256 over everything that decides a response: model, decoding and seed (`made_by`), and the prompt's tokens."""
    content = json.dumps({"made_by": made_by, "prompt_ids": prompt_ids}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


class ResponseStore:
    """An open store; `responses` maps keys to what is in it."""

    def __init__(self, file: BinaryIO, responses: dict[str, Response]):
        self.responses = responses
        self._file = file

    def add(self, made_by: dict[str, Any], answered: list[tuple[RenderedPrompt, Response]]) -> None:
        """Append responses that are not there yet; when this returns they outlive the process and the machine."""
        for prompt, response in answered:
            key = response_key(made_by, prompt.token_ids)
            if key in self.responses:
                continue
            self.responses[key] = response
            record = {
                "key": key,
                "made_by": made_by,
                "prompt": prompt.text,
                "prompt_ids": prompt.token_ids,
                "bos": prompt.bos,
                "response": response.text,
                "token_ids": response.token_ids,
                "finished": response.finished,
            }
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def open_store(path: Path) -> Iterator[ResponseStore]:
    """The store at `path`, made if it is missing, for this process alone.

    A last line that a killed writer left without its end is cut off: its prompt is asked again.

    Raises:
        ValueError: if another process writes to it, or a line is not what was written there.
    """
    with path.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except BlockingIOError as error:
            raise ValueError(f"{path}: another process writes responses to it. Wait for its end, or stop it") from error
        flush_to_disk(path.parent)
        yield ResponseStore(file, _read(path, file))


def _read(path: Path, file: BinaryIO) -> dict[str, Response]:
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: its last line was cut off by the end of its writer and is dropped", path)
        file.truncate(whole)
    responses = {}
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if record["key"] != response_key(record["made_by"], record["prompt_ids"]):
                raise ValueError("its key is not that of its prompt and settings")
            responses[record["key"]] = Response(record["response"], record["token_ids"], record["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a response as it was written ({type(error).__name__}: {error}). Remove "
                "the line, and the prompt is asked again; or remove the file"
            ) from error
    return responses
