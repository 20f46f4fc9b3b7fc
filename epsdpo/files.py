"""How a file is written so that it is there whole or not at all, whenever its writer is killed; how one is read that
may be damaged all the same, or that others wrote; and full disks."""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
AFTER_DISK_FULL = (
    "Free some space and give the same command again: finished stages are kept, and training goes on from its last "
    "whole checkpoint"
)

_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # what some network file systems answer, for folders above all
_ROOM_TO_WORK = 2**20  # bytes; with less, hardly a log line can be written


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the name `path` when the block ends, unless by an exception.

    Content and name are on the disk when the block has ended, so that also a machine that loses power keeps either what
    was there or what is new.
    """
    partial = path.with_name(path.name + ".partial")
    yield partial
    flush_to_disk(partial)
    partial.replace(path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until all that lies below a folder, with all names and its own, is on the disk; what is there costs little.

    It belongs before anything that says that the folder is complete: a manifest, or the name that it gets for it.
    """
    for path in (*folder.rglob("*"), folder, folder.resolve().parent):
        if path.is_dir() or path.is_file():
            flush_to_disk(path)


def read_text(path: Path) -> str:
    """The text of a file that may come from any editor or tool; see `text_of`.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is no such text.
    """
    return text_of(path.read_bytes())


def text_of(content: bytes) -> str:
    """What bytes say in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark, every line ended by a line feed.

    Lines are to be taken apart at line feeds alone: `str.splitlines` would also end one at U+2028, which JSON permits
    inside its strings.

    Raises:
        UnicodeDecodeError: if it is no such text.
    """
    encoding = encoding_of(content)
    text = io.TextIOWrapper(io.BytesIO(content), encoding, newline=None).read()
    if content and not text:
        raise UnicodeDecodeError(encoding, content, 0, len(content), "a byte-order mark with nothing behind it")
    return text


def encoding_of(content: bytes) -> str:
    """The encoding of a text, by the byte-order mark or the zeros at its start; UTF-8 where there is neither."""
    return json.detect_encoding(content)


def disk_is_full(folder: Path) -> bool:
    """Whether the file system of `folder` has no room left; a user's quota does not show."""
    return shutil.disk_usage(folder).free < _ROOM_TO_WORK


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file, or no whole object in it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
