"""A folder and the one experiment whose results it holds: its resolved config, written and compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from epsdpo.experiment.gguf_file import is_gguf, told_by_content, with_content
from epsdpo.experiment.load import load_experiment
from epsdpo.experiment.schema import ABOUT_EARLIER_PARTS, Experiment
from epsdpo.experiment.sections.model import ModelSection
from epsdpo.experiment.values import flatten
from epsdpo.files import written_whole
from epsdpo.methods.errors import ConfigError

EXPERIMENT_FILE = "experiment.yaml"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in C, ten times as fast, where libyaml is


def experiment_text(experiment: Experiment) -> str:
    """The resolved config, defaults included, as YAML that `load_experiment` reads back to an equal object."""
    return yaml.safe_dump(experiment.model_dump(), sort_keys=False, allow_unicode=True)


def save_experiment(experiment: Experiment, path: str | Path) -> None:
    """Write `experiment_text` to a file."""
    Path(path).write_text(experiment_text(experiment), encoding="utf-8")


def load_saved(path: str | Path) -> Experiment:
    """Read back what `save_experiment` wrote: it was checked in full then, so that trl need not be loaded.

    Raises:
        ConfigError: naming the file, if it is damaged, or was written by a version with other keys.
    """
    try:
        return _experiment_of(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read as the config of a run ({_in_short(error)}). Restore it, or move its folder away"
        ) from error


@functools.lru_cache(maxsize=4096)
def _experiment_of(text: str) -> Experiment:
    """Of the same text once: whoever follows a batch of hundreds of experiments reads all of them again and again."""
    return Experiment.model_validate(yaml.load(text, Loader=_LOADER))


def _in_short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'its content'}: {first['msg']}"
    return " ".join(str(error).split()) or type(error).__name__


def claim_folder(
    experiment: Experiment, folder: str | Path, pin: Callable[[ModelSection], ModelSection] | None = None
) -> Experiment:
    """Make `folder` the place of this experiment, and return the experiment as its config file there states it.

    Results of one config are never mixed with those of another: a folder is refused once it holds a different one.

    Args:
        pin: replaces a model revision that may move by the commit it stands for; asked only for a new folder.

    Raises:
        ConfigError: if the folder holds another config, naming the keys that differ and the remedy.
    """
    path = Path(folder) / EXPERIMENT_FILE
    if path.exists():
        claimed = load_experiment(path)
        if is_gguf(experiment.model.name_or_path):
            experiment = experiment.model_copy(update={"model": with_content(experiment.model)})
        elif experiment.model.revision is None:
            model = experiment.model.model_copy(update={"revision": claimed.model.revision})
            experiment = experiment.model_copy(update={"model": model})
        old, new = (_decisive(one) for one in (claimed, experiment))
        changes = [
            f"{key} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}"
            for key in {**old, **new}
            if (key in old, old.get(key)) != (key in new, new.get(key))
        ]
        if changes:
            raise ConfigError(
                f"{path.parent} holds results of another config ({'; '.join(changes)}). "
                "Choose another folder with --output, or delete this one"
            )
        return experiment
    if pin is not None:
        experiment = experiment.model_copy(update={"model": pin(experiment.model)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_experiment(experiment, partial)
    return experiment


def _decisive(experiment: Experiment) -> dict[str, Any]:
    values = experiment.model_dump(exclude={"train": set(ABOUT_EARLIER_PARTS)})
    return flatten({**values, "model": told_by_content(values["model"], "name_or_path")})
