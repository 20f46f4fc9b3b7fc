"""The published runs of an experiment, as the repository keeps them: a file for each, under a digest of its content.

    GOLD/README.md
    GOLD/<recipe>/<digest>.json.gz

They repeat one config on other threads, processors and libraries, or in other worlds, by which the names of a recipe's
experiments alone differ; a repeat with another seed says what an evaluation comes to and nothing of single steps.
"""

import gzip
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsdpo.experiment import ConfigError
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.files import written_whole
from epsdpo.trajectory.same_run.quantities import RunNumbers

FEWEST = 3  # repeats that an interval is made of
_ENDING = ".json.gz"


@dataclass(frozen=True)
class Gold:
    """The repeats of one experiment, or of a recipe in several worlds.

    Attributes:
        repeats: those with the published seed.
        other_seeds: the rest.
    """

    repeats: list[RunNumbers]
    other_seeds: list[RunNumbers]


def add_to_gold(run: RunNumbers, gold: Path) -> Path:
    """Keep a run as one more repeat of its experiment; the same run twice is one file."""
    text = run.as_text().encode()
    path = gold / recipe_and_world(run.experiment)[0] / f"{hashlib.sha256(text).hexdigest()[:12]}{_ENDING}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_bytes(gzip.compress(text, mtime=0))
    return path


def folders_of(experiment: str) -> list[Path]:
    """Where the repository may have something of an experiment, by its name alone."""
    return sorted((REPOSITORY / "configs").glob(f"*/gold/{recipe_and_world(experiment)[0]}"))


def gold_of(run: RunNumbers, given: Path | None = None) -> Gold | None:
    """What is published of a run's experiment; None if nothing is.

    Args:
        given: gold, or in it the folder of an experiment. Without it that of any configs whose experiment has the run's
            name, method, data and model: what a run may do otherwise and still be asked about is training.
    """
    if given is not None:
        return _read(given / recipe_and_world(run.experiment)[0]) or _read(given)
    for folder in folders_of(run.experiment):
        gold = _read(folder)
        if gold is not None and any(_told_apart_by(repeat) == _told_apart_by(run) for repeat in gold.repeats):
            return gold
    return None


def _read(folder: Path) -> Gold | None:
    files = sorted(folder.glob(f"*{_ENDING}"))
    if not files:
        return None
    try:
        runs = [RunNumbers.of_text(gzip.decompress(file.read_bytes()).decode()) for file in files]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: holds a file that cannot be read as a published run ({error})") from error
    (seed, _), *_ = Counter(run.seed() for run in runs).most_common(1)
    repeats = [run for run in runs if run.seed() == seed]
    if len(repeats) < FEWEST or len({len(run.steps) for run in repeats}) > 1:
        raise ConfigError(
            f"{folder}: needs {FEWEST} repeats of one run at least, of as many steps, and holds "
            f"{', '.join(f'{len(run.steps)} steps' for run in repeats)}. Add some: verify RUN --add-to GOLD"
        )
    return Gold(repeats, [run for run in runs if run.seed() != seed])


def _told_apart_by(run: RunNumbers) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key.split(".")[0] in ("method", "data", "model")}
