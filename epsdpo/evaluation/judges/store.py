"""Where judgements are kept: a line of JSON per answer, appended whole, so that a kill tears one line at most.

This module knows files. What a record says is decided in `epsdpo.evaluation.judges.ask`. What UTF-8 cannot write is
replaced before it is kept; where an older version kept it all the same, when it is read.
"""

import contextlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import filelock

from epsdpo.evaluation.judges.answers import still_an_answer
from epsdpo.evaluation.judges.comparison import JudgeError
from epsdpo.files import flush_to_disk, writable

logger = logging.getLogger(__name__)

JUDGEMENTS = "judgements.jsonl"
FAILURES = "failures.jsonl"
_LOCK = "judgements.lock"


class JudgementStore:
    """The answers in a folder, each under its key; used as a context manager by one process at a time.

    `judgements.jsonl` holds answers only. Failures are a log beside it, `failures.jsonl`, which nobody reads back: what
    failed has no key among the answers, and so is asked again.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._records: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "JudgementStore":
        self.directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as resources:
            lock = filelock.FileLock(self.directory / _LOCK, timeout=0)
            try:
                resources.enter_context(lock)
            except filelock.Timeout as error:
                raise JudgeError(
                    f"{self.directory}: another process is judging into this folder. Wait for it, or use another"
                ) from error
            records = _read(self.directory / JUDGEMENTS)
            valid = [record for record in records if still_an_answer(record.get("answer"))]
            if len(valid) < len(records):
                logger.warning(
                    "%s: %d answers have next to nothing on either identifier: they are no judgements, and asked again",
                    *(self.directory / JUDGEMENTS, len(records) - len(valid)),
                )
            self._records = {record["key"]: record for record in valid}
            _drop_torn_line(self.directory / FAILURES)
            self._judgements = resources.enter_context((self.directory / JUDGEMENTS).open("ab", buffering=0))
            self._failures = resources.enter_context((self.directory / FAILURES).open("ab", buffering=0))
            flush_to_disk(self.directory)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._resources.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of an answer, None if there is none yet."""
        return self._records.get(key)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keep an answer under its `key`, and return it as it is kept; it is on the disk then."""
        record = writable(record)
        _check(record, "a new judgement")
        if record["key"] in self._records:
            raise JudgeError(f"{self.directory / JUDGEMENTS} holds an answer for {record['key']} already")
        _append(self._judgements.fileno(), record)
        self._records[record["key"]] = record
        return record

    def add_failure(self, record: dict[str, Any]) -> None:
        """Log a failure."""
        _append(self._failures.fileno(), writable(record))


def _append(file: int, record: dict[str, Any]) -> None:
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    end = os.fstat(file).st_size
    try:
        if os.write(file, line) != len(line):
            raise OSError("the line was written in part, which is what a full disk does")
        os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, of which a torn last line is cut off.

    Raises:
        JudgeError: if any other line is no judgement, naming it.
    """
    _drop_torn_line(path)
    lines = path.read_bytes().splitlines() if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = writable(json.loads(line))  # which decodes halves of surrogate pairs too
        except ValueError as error:
            raise JudgeError(
                f"{path}, line {number} is not JSON ({error}). Delete that line, and it is asked again"
            ) from error
        _check(record, f"{path}, line {number}")
        records.append(record)
    return records


def _check(record: Any, where: str) -> None:
    known = isinstance(record, dict) and isinstance(record.get("key"), str)
    preference = record.get("preference") if known else None
    if type(preference) not in (int, float) or not math.isfinite(preference) or not 1.0 <= preference <= 2.0:
        raise JudgeError(
            f"{where} is no judgement: it needs a key and a preference in [1, 2], and has {str(record)[:200]}. "
            "Delete it, and it is asked again"
        )


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last line break: a line that was being written when its process was killed."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: a kill tore the last line (%d bytes); it is asked again", path, len(content) - whole)
        os.truncate(path, whole)
