"""Whether finished stages are still as they ended: their files against the hashes in their manifests.

A stage reads what earlier ones left. What was cut off, edited or mixed up since would be drawn and counted as if it
were whole, so that each stage looks at its inputs first, and `epsdpo status --verify` at a whole folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from epsdpo.experiment import ConfigError
from epsdpo.runs.layout import EXECUTED, PAGE, SUPERSEDED
from epsdpo.runs.manifest import MANIFEST, changed_outputs, read_manifest, unreadable

_REMEDY = "Restore it, or delete {folder}, which the same `epsdpo run` then makes again"


def check_inputs(inputs: Iterable[Path], output_dir: Path) -> None:
    """Refuse to read what a stage has left and is no longer so.

    Its page and executed notebook are for people, who may have saved them again.

    Args:
        inputs: files and folders that a stage is about to read: folders of stages, of experiments, of batches.
        output_dir: of that stage, which may lie in one of them.

    Raises:
        ConfigError: a line for each file, with what is wrong with it and what to do.
    """
    problems = []
    for path in inputs:
        for folder in stages_below(path):
            if folder.resolve() != output_dir.resolve():
                changes = changed_outputs(folder, lambda name: name not in (EXECUTED, PAGE))
                problems += [f"{change}. {_REMEDY.format(folder=folder)}" for change in changes]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def stages_below(folder: Path) -> Iterator[Path]:
    """Folders that hold a manifest: this one, those of a batch or an experiment; not what was superseded."""
    for depth in ("", "*/", "*/*/"):
        for manifest in sorted(folder.glob(depth + MANIFEST)):
            if SUPERSEDED not in manifest.relative_to(folder).parts:
                yield manifest.parent


def verify(folder: Path) -> int:
    """Print every file of the stages in a folder that is no longer as its stage left it; 1 if there are any, else 0.

    Raises:
        ConfigError: if no stage has finished there.
    """
    stages = list(stages_below(folder))
    if not stages:
        raise ConfigError(f"{folder} holds no {MANIFEST}: no stage has finished there. Give a folder of `epsdpo run`")
    problems, files, by_size = 0, 0, 0
    for stage in stages:
        damaged = unreadable(stage)
        found = [f"{damaged} cannot be read"] if damaged else changed_outputs(stage)
        for problem in found:
            print(f"changed  {problem}. {_REMEDY.format(folder=stage)}")
        outputs = (read_manifest(stage) or {}).get("outputs", {})
        problems += len(found)
        files += len(outputs)
        by_size += sum("sha256" not in described for described in outputs.values())
    sized = f", {by_size} of them large ones of which only the size is known" * bool(by_size)
    print(f"{problems} of {files} files of {len(stages)} finished stages have changed{sized}")
    return int(problems > 0)
