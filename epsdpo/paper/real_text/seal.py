"""Predictions that are written, with their SHA-256 and the time, before anything that they are about is measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from epsdpo.experiment import ConfigError
from epsdpo.files import written_whole

PREDICTIONS, DIGEST, WRITTEN = "predictions.csv", "predictions.sha256", "predictions.time"


@dataclass(frozen=True)
class Seal:
    """Predictions as they were written.

    Attributes:
        digest: SHA-256 of the file.
        written: when, UTC.
    """

    path: Path
    digest: str
    written: str

    def read(self) -> pd.DataFrame:
        return pd.read_csv(self.path)


def sealed(folder: Path, predictions: pd.DataFrame, measured: bool) -> Seal:
    """The predictions of a folder: those that were written there before, verified, or these, written now.

    Args:
        measured: whether anything that they are about was measured already.

    Raises:
        ConfigError: if what was written is not what it was, or not what follows from the exact pass; or if something
            was measured before them.
    """
    files = [folder / name for name in (PREDICTIONS, DIGEST, WRITTEN)]
    content = predictions.to_csv(index=False).encode()
    if not all(file.is_file() for file in files):
        if measured:
            raise ConfigError(
                f"{folder} holds measurements, and not the predictions that were written before them. {_ANEW}"
            )
        # The time is written last: without it nothing was promised yet.
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for file, text in zip(files, (content, _line(content), f"{now}\n".encode()), strict=True):
            with written_whole(file) as partial:
                partial.write_bytes(text)
    if files[1].read_bytes() != _line(files[0].read_bytes()):
        raise ConfigError(f"{files[0]} is not what was written: its SHA-256 is not that of {DIGEST}. {_ANEW}")
    if files[0].read_bytes() != content:
        raise ConfigError(f"{files[0]} is not what follows from the exact pass beside it. {_ANEW}")
    return Seal(files[0], hashlib.sha256(content).hexdigest(), files[2].read_text(encoding="utf-8").strip())


_ANEW = "Move the folder away: all is then foretold and measured anew"


def _line(content: bytes) -> bytes:
    """As `sha256sum` writes it, so that `sha256sum --check` verifies it."""
    return f"{hashlib.sha256(content).hexdigest()}  {PREDICTIONS}\n".encode()
