"""Files that are there whole or not at all, whenever their writer is killed, and whose text is text.

JSON, YAML and a command line can all express half of a surrogate pair, such as "\\ud83d", the first half of an emoji
that was cut. Python keeps it as text, and no file in UTF-8, no Parquet table, tokenizer or figure takes it: what comes
from others is made writable, or refused, before it is kept.
"""

import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
AFTER_DISK_FULL = (
    "Free some space and give the same command again: finished stages are kept, and training goes on from its last "
    "whole checkpoint"
)

_PARTIAL = ".partial"
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # what some network file systems answer, for folders above all
_ROOM_TO_WORK = 2**20  # bytes; with less, hardly a log line can be written


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the name `path` when the block ends, unless by an exception.

    Content and name are on the disk when the block has ended, so that also a machine that loses power keeps either what
    was there or what is new.
    """
    partial = partial_of(path)
    yield partial
    flush_to_disk(partial)
    partial.replace(path)
    flush_to_disk(path.parent)


def partial_of(path: Path) -> Path:
    """The name beside `path` under which it is written until it is whole."""
    return path.with_name(path.name + _PARTIAL)


def is_left_over(name: str | Path) -> bool:
    """Whether a path, from the folder in question, is what a killed writer left of a file, or lies in what one left of
    a folder: the next that writes there takes it away, so it belongs in no list of what the folder holds."""
    return any(part.endswith(_PARTIAL) for part in Path(name).parts)


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


def writable(value: Any) -> Any:
    """The value with U+FFFD for each half of a surrogate pair, and halves that belong together joined.

    Looks into lists, tuples (which become lists) and dictionaries, keys included; all else stays as it is.
    """
    if isinstance(value, str):
        if is_writable(value):
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    return value


def is_writable(text: str) -> bool:
    """Whether UTF-8 can write a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts_in(value: Any, at: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Each text in nested lists and mappings, keys included, with the keys and places that lead to it."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key, (*at, key))
            yield from texts_in(item, (*at, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from texts_in(item, (*at, number))
