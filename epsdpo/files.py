"""How a file is written so that it is there whole or not at all, whenever its writer is killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the name `path` when the block ends, unless by an exception."""
    partial = path.with_name(path.name + ".partial")
    yield partial
    partial.replace(path)
