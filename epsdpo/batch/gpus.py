"""How stages on one machine share its GPUs: each takes those that no other has, and lets go of them when it ends."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from epsdpo.experiment import ConfigError
from epsdpo.runs.layout import STATE_FOLDER

_SECONDS_BETWEEN_TRIES = 1.0


@contextlib.contextmanager
def taken_gpus(share: str, folder: Path) -> Iterator[None]:
    """Show this process, and what it starts, N of M GPUs that no other stage of the same batch has; wait for them.

    Args:
        share: "N/M"; "" leaves GPUs as they are.
        folder: of the stage, in whose run folder the locks lie. The system releases them however the process ends.

    Raises:
        ConfigError: if fewer than M GPUs are visible.
    """
    if not share:
        yield
        return
    wanted, total = map(int, share.split("/"))
    visible = _visible_gpus(total)
    locks = _locks(folder, total)
    taken: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(taken) < wanted:
            for number, lock in enumerate(locks):
                if number in taken or len(taken) == wanted:
                    continue
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=0)
                    stack.callback(lock.release)
                    taken.append(number)
            if len(taken) < wanted:
                time.sleep(_SECONDS_BETWEEN_TRIES)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[number] for number in sorted(taken))
        yield


def _visible_gpus(total: int) -> list[str]:
    """Names of the first `total` GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(total)] if visible is None else visible.split(",")
    if len(names) < total:
        raise ConfigError(
            f"--gpus is {total}, but CUDA_VISIBLE_DEVICES={visible} shows {len(names)}; give at most that many"
        )
    return names


def _locks(folder: Path, total: int) -> list[filelock.FileLock]:
    places = (parent / STATE_FOLDER for parent in folder.resolve().parents)
    state = next((place for place in places if place.is_dir()), None)
    if state is None:
        raise ConfigError(
            f"{folder} lies in no run folder of `epsdpo run`, whose stages could share GPUs. Leave out --take-gpus"
        )
    return [filelock.FileLock(state / f"gpu-{number}.lock") for number in range(total)]
