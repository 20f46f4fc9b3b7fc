"""How a file is written so that it is there whole or not at all, whenever its writer is killed; and full disks."""

import errno
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


def disk_is_full(folder: Path) -> bool:
    """Whether the file system of `folder` has no room left; a user's quota does not show."""
    return shutil.disk_usage(folder).free < _ROOM_TO_WORK
