"""The manifest of a stage: what went in, what came out, and on what it was made.

A folder is finished if, and only if, it holds a manifest: it is written last and appears in one piece. Whether the
folder is still as its manifest says can be asked at any time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epsdpo.experiment import Experiment
from epsdpo.files import flush_tree, is_left_over, read_object, writable, written_whole
from epsdpo.runs.fingerprint import key_of
from epsdpo.runs.machine import machine

MANIFEST = "manifest.json"
STAGE_FILE = "stage.json"
LOG = "stage.log"  # of the process that ran the stage
TRAININGS = ("sft", "train")  # stages that leave a record of their steps, checkpoints and weights
_READ_OF_STAGE_FILE = {"status", "started", "pid", "host"}
PACKAGES = ("epsdpo", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy")

# Weights are large and their size says enough; hashing tens of gigabytes would cost minutes.
LARGEST_HASHED_BYTES = 64 * 2**20


def write_manifest(
    output_dir: Path,
    *,
    stage: str,
    parameters: dict[str, Any],
    facts: dict[str, Any],
    parts: dict[str, dict],
    inputs: list[Path],
    started: datetime,
    repository: Path,
) -> Path:
    """Declare `output_dir` finished: describe it in `manifest.json`, which appears in one piece.

    All that lies in `output_dir` is on the disk before it appears, so that no machine that loses power keeps a manifest
    of files that it has lost.

    Args:
        facts: of the experiment behind the stage, see `experiment_facts`.
        parts: of its key: settings, code and inputs.
        inputs: files and folders that the stage read. A folder that holds manifests is described by these, any other
            by its files.
        started: when the stage began, in UTC.
        repository: where the code lies, to record its git commit.
    """
    finished = datetime.now(UTC)
    content = {
        "stage": stage,
        "status": "ok",
        "exit_code": 0,
        "command": sys.argv,
        "parameters": parameters,
        "key": key_of(parts),
        "key_parts": parts,
        **facts,
        "started": started.isoformat(timespec="seconds"),
        "finished": finished.isoformat(timespec="seconds"),
        "seconds": round((finished - started).total_seconds(), 3),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine(),
        "git": _git_state(repository),
        "inputs": {str(path): _describe(path) for path in _input_files(inputs, output_dir)},
        "outputs": {
            path.relative_to(output_dir).as_posix(): _describe(path)
            for path in _files_below(output_dir)
            if path.name not in (STAGE_FILE, LOG)  # which change until the end, and after it
            and not is_left_over(path.relative_to(output_dir))
        },
    }
    flush_tree(output_dir)
    _write(output_dir / MANIFEST, content)
    (output_dir / STAGE_FILE).unlink(missing_ok=True)
    return output_dir / MANIFEST


def write_stage_file(output_dir: Path, *, stage: str, parts: dict[str, dict], started: datetime, **state: Any) -> None:
    """Say in `stage.json` that a stage has begun in `output_dir`, or with `status="failed"` how it ended.

    The file is there until the stage has finished. Beside a folder's content it tells what that was to become.
    """
    _write(
        output_dir / STAGE_FILE,
        {
            "stage": stage,
            "status": "running",
            "command": sys.argv,
            "key": key_of(parts),
            "key_parts": parts,
            "started": started.isoformat(timespec="seconds"),
            "pid": os.getpid(),
            "host": platform.node(),
            "inode": output_dir.stat().st_ino,  # which a copy of the folder does not have
            **state,
        },
    )


def keep(folder: Path, code: dict[str, str], repository: Path) -> None:
    """Accept a finished result, which other code made, as that of `code`; its manifest says so, and by which commit."""
    kept = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "git": _git_state(repository), "code": code}
    _write(folder / MANIFEST, {**read_manifest(folder), "kept": kept})


def is_kept(manifest: dict[str, Any], code: dict[str, str]) -> bool:
    """Whether a result was accepted as that of this code."""
    return "kept" in manifest and manifest["kept"].get("code") == code


def commit_of(manifest: dict[str, Any]) -> str:
    """The git commit that a stage ran in, shortened, and whether files were changed since, "" outside of git; of a
    result that was kept, also that which kept it."""
    made = _shortened(manifest.get("git"))
    if "kept" not in manifest:
        return made
    return f"{made or 'not in git'}, kept by {kept_by(manifest)}"


def kept_by(manifest: dict[str, Any]) -> str:
    """The commit that a result was kept by."""
    return _shortened(manifest["kept"].get("git")) or "not in git"


def commit_now(repository: Path) -> str:
    """That which a result would be kept by now."""
    return _shortened(_git_state(repository)) or "not in git"


def _shortened(git: dict[str, Any] | None) -> str:
    return "" if git is None else git["commit"][:10] + (" + changes" if git["dirty"] else "")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None if the folder is not finished: it has none, or one that cannot be read."""
    manifest = read_object(folder / MANIFEST)
    return manifest if manifest is not None and _has_a_key(manifest) else None


def read_stage_file(folder: Path) -> dict[str, Any] | None:
    """What `write_stage_file` last said in `folder`; None where no stage has begun, or one has finished, or where what
    is there cannot be read."""
    state = read_object(folder / STAGE_FILE)
    return state if state is not None and state.keys() >= _READ_OF_STAGE_FILE and _has_a_key(state) else None


def unreadable(folder: Path) -> Path | None:
    """The manifest or stage file in `folder` that is there and cannot be read: empty, cut off, or something else."""
    for name, read in ((MANIFEST, read_manifest), (STAGE_FILE, read_stage_file)):
        if os.path.lexists(folder / name):
            return folder / name if read(folder) is None else None
    return None


def changed_outputs(folder: Path, only: Callable[[str], bool] = lambda name: True) -> list[str]:
    """In words, each output in `folder` that is no longer as its manifest describes it; files beside them are not seen.

    A file of `LARGEST_HASHED_BYTES` or more is compared by its size. Of a training, weights and checkpoints may have
    been removed since, folder by folder, to save disk: who needs them will miss them.

    Args:
        only: chooses outputs, by their paths from `folder`.
    """
    manifest = read_manifest(folder) or {}
    changes = []
    for name, described in manifest.get("outputs", {}).items():
        path = folder / name
        removed = "/" in name and manifest.get("stage") in TRAININGS and not (folder / name.split("/")[0]).exists()
        if removed or is_left_over(name) or not only(name):  # manifests of before this was looked at list them
            continue
        if not path.is_file():
            changes.append(f"{path} is gone")
        elif path.stat().st_size != described["bytes"]:
            changes.append(f"{path} has {path.stat().st_size} bytes, and its stage left {described['bytes']}")
        elif _describe(path) != described:
            changes.append(f"{path} holds something else than its stage left (its SHA-256 differs)")
    return changes


def experiment_facts(experiment: Experiment) -> dict[str, Any]:
    """What a manifest says of the experiment behind a stage."""
    return {
        "experiment": experiment.name,
        "seeds": {"experiment": experiment.seed, "world": experiment.data.world.seed},
        "global_batch_size": experiment.train["global_batch_size"],
        "model": {"name_or_path": experiment.model.name_or_path, "revision": experiment.model.revision},
        "data": {"source": experiment.data.source, "revision": experiment.data.revision},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(writable(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _has_a_key(content: dict[str, Any]) -> bool:
    parts = content.get("key_parts", {})
    whole = isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values())
    return whole and isinstance(content.get("key"), str) and isinstance(content.get("kept", {}), dict)


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size >= LARGEST_HASHED_BYTES:
        return {"bytes": size}
    with path.open("rb") as file:
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _input_files(inputs: list[Path], output_dir: Path) -> list[Path]:
    """The files that stand for the inputs; a batch folder holds the stage's own output too, which is no input."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            below = [file for file in _files_below(path) if not file.is_relative_to(output_dir)]
            files += [file for file in below if file.name == MANIFEST] or below
        else:
            files.append(path)
    return files


def _git_state(repository: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the code, or None where it does not lie in a git checkout with a commit."""
    if shutil.which("git") is None:
        return None
    commit, status = (
        subprocess.run(["git", "-C", str(repository), *command], capture_output=True, text=True, check=False)
        for command in (["rev-parse", "--verify", "HEAD"], ["status", "--porcelain"])
    )
    if commit.returncode != 0:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}
