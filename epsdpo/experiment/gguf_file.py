"""A GGUF file that a config names in place of a model: told from every other by its content, wherever it lies."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from epsdpo.experiment.sections.model import ModelSection
from epsdpo.methods.errors import ConfigError


class GgufError(ConfigError):
    """A GGUF file that cannot be used. The message names it, and what to do."""


def is_gguf(name: str) -> bool:
    """Whether a config names a file of this kind, by its ending alone; it need not be there."""
    return name.lower().endswith(".gguf") and not Path(name).is_dir()


def content_of(name: str, expected: str | None = None) -> str:
    """What stands for a GGUF file as a commit does for a model of the hub: `sha256:` and the digest of its bytes.

    Args:
        expected: the `revision` of a config, which that must be.

    Raises:
        GgufError: if the file cannot be read, or holds something else.
    """
    try:
        with Path(name).open("rb") as file:
            content = _digest(name, *_identity(os.fstat(file.fileno())))
    except OSError as error:
        raise GgufError(
            f"{name!r}: {error.strerror}, seen from {Path.cwd()}. Check the path of the GGUF file"
        ) from error
    if expected not in (None, content):
        raise GgufError(
            f"{name!r} is {content}, and revision says {expected!r}. Name the file of that content, or remove the "
            "revision and choose another output folder"
        )
    return content


def with_content(model: ModelSection) -> ModelSection:
    """The section with the content of its GGUF file as its revision; of a file that is gone, that which was recorded.

    Raises:
        GgufError: as `content_of`.
    """
    if model.revision is not None and not Path(model.name_or_path).exists():
        return model
    return model.model_copy(update={"revision": content_of(model.name_or_path, model.revision)})


def told_by_content(section: dict[str, Any], key: str) -> dict[str, Any]:
    """The values of a section as they decide a result: of a GGUF file under `key`, its content and not its name."""
    name = section[key]
    if not (name and is_gguf(name)):
        return section
    content = section["revision"] or (content_of(name) if Path(name).is_file() else None)
    return section if content is None else {**section, key: "a GGUF file", "revision": content}


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=64)
def _digest(name: str, *_: int) -> str:
    """Once for a process, as long as the file is not written to: a plan asks for it many times."""
    with Path(name).open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
