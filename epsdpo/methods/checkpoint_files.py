"""Which checkpoints are whole: each ends with a list of its files, by which it is known again.

transformers, TRL, DeepSpeed and torch write the files of a checkpoint, some of them in every process, and read back
whatever they find there. Here the list is written when all have ended, and what is wrong with a checkpoint is said in
words.
"""

import hashlib
import json
import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from epsdpo.files import flush_to_disk, is_left_over, written_whole

logger = logging.getLogger(__name__)

# Not called .json: files so called tell models apart, and it has no part in what a model in this folder says.
FILES_LIST = "checkpoint.files"

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")

# What a run cannot go on without, by the name that one process gives it, and all names that it may have. DeepSpeed has
# everything but random states in its folder, FSDP2 optimiser and weights in folders of shards.
_PARTS = {
    "model.safetensors": (
        "model*.safetensors",
        "adapter_model.safetensors",
        "*/adapter_model.safetensors",
        "pytorch_model*",
        "global_step*",
    ),
    "optimizer.pt": ("optimizer*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


class NotWhole(ValueError):
    """A checkpoint that cannot be used. The message says what is wrong with it."""


def seal(checkpoint: Path, rows: dict[str, Any] | None) -> None:
    """Declare a checkpoint whole: list all its files in `checkpoint.files` (JSON), which appears last and in one piece.

    Every file is on the disk before the list is. It is read once for its SHA-256, about a second per GB, in one process
    while the others wait.

    Args:
        rows: what of the run's record belongs to the checkpoint, as the record's `rows` tells it.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        if name == FILES_LIST or is_left_over(name):  # of an earlier writer of the same checkpoint
            continue
        flush_to_disk(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    for folder in (checkpoint, *(path for path in checkpoint.rglob("*") if path.is_dir())):
        flush_to_disk(folder)
    with written_whole(checkpoint / FILES_LIST) as partial:
        partial.write_text(json.dumps({"files": files, "rows": rows}, indent=1), encoding="utf-8")


def read_list(checkpoint: Path) -> dict[str, Any] | None:
    """What `seal` wrote, as `files`, name -> (bytes, SHA-256), and `rows`; None where there is no list.

    Raises:
        NotWhole: if it cannot be read.
    """
    if not (checkpoint / FILES_LIST).exists():
        return None
    content = _read_json(checkpoint / FILES_LIST)
    try:
        files = {name: (int(file["bytes"]), str(file["sha256"])) for name, file in content["files"].items()}
        return {"files": files, "rows": content["rows"]}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise NotWhole(f"its {FILES_LIST} cannot be read") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What transformers says in `trainer_state.json`, the last file that it writes.

    Raises:
        NotWhole: if that is not there, is no such state, or is of another step than the folder's name says.
    """
    if not checkpoint.is_dir():
        raise NotWhole("it is a file and no folder" if checkpoint.exists() else "there is no such folder")
    state = _read_json(checkpoint / TRAINER_STATE_NAME)
    step = state.get("global_step")
    if type(step) is not int or step < 1:
        raise NotWhole(f"its {TRAINER_STATE_NAME} is of no optimiser step (global_step: {step!r})")
    named = _NUMBERED.fullmatch(checkpoint.name)
    if named and int(named[1]) != step:
        raise NotWhole(f"its {TRAINER_STATE_NAME} is of step {step}")
    return state


def require_loadable(state: dict[str, Any]) -> None:
    """Refuse a state that transformers would fail on; of use where no list says that it is as it was written.

    Raises:
        NotWhole: if it is not one.
    """
    try:
        TrainerState(**state)
        loadable = type(state["train_batch_size"]) is int
    except (KeyError, TypeError):
        loadable = False
    if not loadable:
        raise NotWhole(f"its {TRAINER_STATE_NAME} is no state of a training")


def require_listed(checkpoint: Path, files: dict[str, tuple[int, str]]) -> None:
    """Compare a checkpoint with the list of its files; what lies there besides is not looked at.

    Raises:
        NotWhole: naming the first file that is not what the list says.
    """
    for name, (listed_size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise NotWhole(f"{checkpoint.name} holds no {name}, which is in the list of its files")
        size = path.stat().st_size
        if size != listed_size:
            raise NotWhole(f"its {name} has {size} bytes instead of {listed_size}")
    for name, (_, digest) in files.items():
        if _sha256(checkpoint / name) != digest:
            raise NotWhole(f"the content of its {name} is not what was written (its SHA-256 is another)")


def require_parts(checkpoint: Path) -> None:
    """Refuse a checkpoint of which a run could only begin anew, with other moments, learning rates or random numbers.

    Raises:
        NotWhole: naming what it lacks.
    """
    lacks = [part for part, names in _PARTS.items() if not any(any(checkpoint.glob(name)) for name in names)]
    if lacks:
        raise NotWhole(
            f"it holds no {' and no '.join(lacks)}, without which the run would go on as another one "
            "(save_only_model=True leaves them out)"
        )


def require_readable_files(checkpoint: Path) -> None:
    """Look at the files of a checkpoint that has no list, as far as their formats tell of damage.

    Raises:
        NotWhole: naming the first file that is empty or cut off.
    """
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip() is not None
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    damaged = False
            else:
                damaged = path.is_file() and path.stat().st_size == 0
        except (zipfile.BadZipFile, SafetensorError, OSError):
            damaged = True
        if damaged:
            raise NotWhole(f"its {path.name} is empty, cut off or damaged")


def numbered_checkpoints(output_dir: str | Path) -> dict[int, Path]:
    """Optimiser step -> what is called a checkpoint of it, in order."""
    found = ((_NUMBERED.fullmatch(path.name), path) for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return dict(sorted((int(named[1]), path) for named, path in found if named))


def pass_over_unnumbered(output_dir: str | Path) -> None:
    """Say that what is called a checkpoint of no step, such as `checkpoint-best`, is not used."""
    for path in sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if not _NUMBERED.fullmatch(path.name):
            pass_over(path, "its name tells no optimiser step")


def pass_over(checkpoint: Path, why: Exception | str) -> None:
    """Say that a checkpoint is not used, and why."""
    logger.warning("passing over %s: %s", checkpoint, why)


def remove(checkpoint: Path) -> None:
    """Make room where a checkpoint is to be written: nothing of an earlier one of that name may be part of it."""
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotWhole(
            f"it holds no {path.name}: its writing was cut off, or it is no checkpoint of a training"
        ) from None
    except ValueError as error:
        raise NotWhole(f"its {path.name} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise NotWhole(f"its {path.name} holds no mapping")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
