"""What was answered, on disk: a line of JSON each, appended when it is there, so that nothing is asked for twice.

    {"key": "3f…", …}\n    found again by its key, a digest of everything that decides the answer
    {"key": "a0…", "re     a line that a killed writer tore: cut off by the next one, and asked for again

What an answer is, and what its key covers, is the business of those who ask: for responses, judgements and scores.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from epsdpo.files import flush_to_disk, writable
from epsdpo.models.response import Failure

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PROGRESS_LINES = 5.0

Item, Found = TypeVar("Item"), TypeVar("Found")


class Kept:
    """Answers by key, in a file that one process at a time has open; used as a context manager."""

    def __init__(self, path: Path | None, read: Callable[[dict[str, Any]], Any]):
        """
        Args:
            path: of the file, made if it is missing; None keeps everything in memory alone.
            read: what a record of the file says. It raises ValueError, KeyError or TypeError for what is no such
                record, and returns None for one that no longer counts as an answer.
        """
        self.path, self._read = path, read
        self._file: BinaryIO | None = None
        self._values: dict[str, Any] = {}

    def __enter__(self) -> "Kept":
        """
        Raises:
            ValueError: if another process has the file open, or a line of it is no answer.
        """
        if self.path is None:
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
            flush_to_disk(self.path.parent)
            self._read_all()
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{self.path}: another process writes to it. Wait for its end, or stop it") from error
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep answers, each under its record's `key`; when this returns, they outlive the process and the machine."""
        records = [writable(record) for record in records]
        values = {record["key"]: self._read(record) for record in records}
        if self._file is not None and records:
            _append(self._file, records)
        self._values |= values

    def _read_all(self) -> None:
        dropped = 0
        _cut_torn_line(self._file, self.path)
        self._file.seek(0)
        for number, line in enumerate(self._file.read().split(b"\n")[:-1], start=1):
            try:
                record = writable(json.loads(line))  # which decodes halves of surrogate pairs too
                value = self._read(record)
                self._values |= {} if value is None else {record["key"]: value}
                dropped += value is None
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number}: not an answer as it was written ({type(error).__name__}: {error}). "
                    "Remove the line, and it is asked for again; or remove the file"
                ) from error
        if dropped:
            logger.warning("%s: %d lines are no answers by today's rules, and asked for again", self.path, dropped)


def append_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append records to a log that nobody reads back, made if it is missing; they are on the disk then."""
    with path.open("ab+", buffering=0) as file:
        _cut_torn_line(file, path)
        _append(file, [writable(record) for record in records])


def _append(file: BinaryIO, records: Sequence[dict[str, Any]]) -> None:
    """All of the records, each in a line, or none of them."""
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records).encode()
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(lines) != len(lines):
            raise OSError("the line was written in part, which is what a full disk does")
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


def _cut_torn_line(file: BinaryIO, path: Path) -> None:
    """Cut off what follows the last line break: a line that was being written when its process was killed."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        logger.warning("%s: its last line was cut off by the end of its writer and is dropped", path)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def ask_missing(
    wanted: dict[str, Item],
    kept: Kept,
    answers: Callable[[Sequence[Item], Sequence[bool]], Iterator[dict[int, Found | Failure]]],
    record: Callable[[str, Item, Found], dict[str, Any]],
    who: str,
    failed: Callable[[str, Item, Failure], None] = lambda key, item, failure: None,
) -> dict[str, Failure]:
    """Ask for what is not kept, and keep each answer as it comes.

    Stopped at any moment and called again, it goes on where it was.

    Args:
        wanted: what is asked, by key.
        answers: gets all that is wanted and which of it is missing, and gives answers and failures by index, a few at a
            time, as they come. It may also answer what is not missing, which is left as it was.
        record: an answer as it is kept, with its `key`.
        who: whose answers they are, for the lines of progress.
        failed: is told of each failure.

    Returns:
        Failures by key.
    """
    keys, items = list(wanted), list(wanted.values())
    missing = [key not in kept for key in keys]
    failures: dict[str, Failure] = {}
    total, done = sum(missing), 0
    if total < len(keys):
        logger.info("%s: %d of %d are answered already", who, len(keys) - total, len(keys))
    if not total:
        return failures
    started = reported = time.monotonic()
    for found in answers(items, missing):
        new = {index: answer for index, answer in found.items() if missing[index]}
        for index, answer in new.items():
            if isinstance(answer, Failure):
                failures[keys[index]] = answer
                failed(keys[index], items[index], answer)
        kept.add([record(keys[i], items[i], answer) for i, answer in new.items() if not isinstance(answer, Failure)])
        done += len(new)
        now = time.monotonic()
        if now - reported > _SECONDS_BETWEEN_PROGRESS_LINES or done == total:
            left = (now - started) / max(done, 1) * (total - done)
            and_failed = f", {len(failures)} failed" if failures else ""
            logger.info("%s: asked %d of %d%s, about %.0f s left", who, done, total, and_failed, left)
            reported = now
    return failures
