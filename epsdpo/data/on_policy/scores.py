"""Scores on disk: one JSON line each, appended when it is there, so that nothing is scored twice.

This module knows the file and what a score belongs to. What scores is left to `epsdpo.data.on_policy.rank`. One process
at a time: who calls holds the store of the responses, which admits no second.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from epsdpo.data.on_policy.rank import Answered, Ranker
from epsdpo.files import flush_to_disk

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PROGRESS_LINES = 5.0


def score_responses(answered: Sequence[Answered], ranker: Ranker, path: Path) -> list[float | None]:
    """The score of each response, in their order, from the file at `path` or asked for and put there.

    A response that occurs twice is scored once. Stopped at any moment and called again, it goes on where it was.
    """
    keys = [_key(ranker.made_by, item) for item in answered]
    distinct = dict(zip(keys, answered, strict=True))
    known = _read(path)
    missing = [key not in known for key in distinct]
    if len(distinct) > sum(missing):
        logger.info("%d of %d responses are scored already", len(distinct) - sum(missing), len(distinct))
    if any(missing):
        _score(distinct, missing, ranker, known, path)
    return [known[key] for key in keys]


def _score(
    distinct: dict[str, Answered], missing: list[bool], ranker: Ranker, known: dict[str, float | None], path: Path
) -> None:
    """Add what is missing to `known` and to the file, batch by batch."""
    keys = list(distinct)
    started = reported = time.monotonic()
    done, total = 0, sum(missing)
    with path.open("ab") as file:
        flush_to_disk(path.parent)
        for scores in ranker.scores(list(distinct.values()), missing):
            new = {keys[number]: score for number, score in scores.items() if keys[number] not in known}
            known |= new
            file.write("".join(json.dumps({"key": key, "score": score}) + "\n" for key, score in new.items()).encode())
            file.flush()
            os.fsync(file.fileno())
            done += len(new)
            now = time.monotonic()
            if now - reported > _SECONDS_BETWEEN_PROGRESS_LINES or done == total:
                left = (now - started) / max(done, 1) * (total - done)
                logger.info("scored %d of %d responses, about %.0f s left", done, total, left)
                reported = now


def _key(made_by: dict[str, Any], item: Answered) -> str:
    return hashlib.sha256(json.dumps([made_by, *item], sort_keys=True).encode("ascii")).hexdigest()


def _read(path: Path) -> dict[str, float | None]:
    """The scores of the file, of which a last line that a kill cut off is dropped."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: its last line was cut off by the end of its writer; it is scored again", path)
        os.truncate(path, whole)
    records = map(json.loads, content[:whole].splitlines())
    return {record["key"]: record["score"] for record in records}
