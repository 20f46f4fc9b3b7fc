"""How a file is written so that it is there whole or not at all, whenever its writer is killed; full disks; and how the
text of files that others wrote is read."""

import errno
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_ROOM_TO_WORK = 2**20  # bytes; with less, hardly a log line can be written


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the name `path` when the block ends, unless by an exception."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)


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
