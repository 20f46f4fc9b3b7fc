"""What is made once and kept between runs, such as the embedded world's model: a folder for whatever decides it.

A folder gets its final name only when it is complete, by one rename, so two processes may build at once and a killed
one leaves nothing that is ever read. A folder damaged later is noticed by its checksums and built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

from epsdpo.files import flush_to_disk, flush_tree

logger = logging.getLogger(__name__)

_CHECKSUMS = "checksums.json"
_CLAIM = "claim"  # locked in a folder by the process that builds in it


def cache_dir() -> Path:
    """Where it is kept: `$EPSDPO_CACHE`, or `~/.cache/epsdpo`. It may be deleted at any time."""
    return Path(os.environ.get("EPSDPO_CACHE") or Path.home() / ".cache" / "epsdpo")


def derived_folder(kind: str, decided_by: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills, built once per value of `decided_by`."""
    key = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]
    target = cache_dir() / f"{kind}-{key}"
    if _is_intact(target):
        return target
    cache_dir().mkdir(parents=True, exist_ok=True)
    with _scratch(kind) as scratch:
        folder = scratch / "new"
        folder.mkdir()
        build(folder)
        (folder / _CHECKSUMS).write_text(json.dumps(_checksums(folder)), encoding="utf-8")
        flush_tree(folder)
        if target.exists() and not _is_intact(target):
            logger.warning("%s is damaged and was built again", target)
            with contextlib.suppress(FileNotFoundError):
                target.rename(scratch / "damaged")
        try:
            folder.rename(target)
            flush_to_disk(target.parent)
        except OSError:  # another process was first; its folder is as good as ours
            if not _is_intact(target):
                raise
    return target


@contextlib.contextmanager
def _scratch(kind: str) -> Iterator[Path]:
    """A folder of the cache to build in, gone in the end; those that killed processes have left go as well."""
    for left_over in cache_dir().glob(f".{kind}-*"):
        with contextlib.suppress(OSError), filelock.FileLock(left_over / _CLAIM, timeout=0):  # a Timeout is one
            shutil.rmtree(left_over)
    # Under another name until it is claimed, so that nobody takes it for left over before.
    unclaimed = Path(tempfile.mkdtemp(prefix=".new-", dir=cache_dir()))
    claim = filelock.FileLock(unclaimed / _CLAIM)
    claim.acquire()
    scratch = unclaimed.rename(unclaimed.with_name(f".{kind}-{unclaimed.name.removeprefix('.new-')}"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        claim.release()


def _checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(path for path in folder.iterdir() if path.name != _CHECKSUMS):
        with path.open("rb") as content:
            checksums[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return checksums


def _is_intact(folder: Path) -> bool:
    try:
        return json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8")) == _checksums(folder)
    except (OSError, ValueError):
        return False
