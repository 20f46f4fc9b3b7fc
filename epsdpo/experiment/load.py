"""From YAML files to experiments: what a file extends, the points of its sweep, and overrides on top.

A config is a stack of layers, merged from the bottom: the files that it extends, the file itself, one point of its
sweep, the overrides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from epsdpo.experiment.keys import keys_of_others
from epsdpo.experiment.schema import LONGEST_NAME, Experiment
from epsdpo.experiment.sweep import OVERRIDE, parse_overrides, point_names, point_title, sweep_points
from epsdpo.experiment.validate import Checked, Layers, check_experiment
from epsdpo.experiment.values import TOO_DEEP, merged, nested, unusable
from epsdpo.files import read_text
from epsdpo.methods.errors import ConfigError

BASE_MARK = "_"  # begins the names of files that are there to be extended, and are no experiments themselves


def load_experiment(path: str | Path) -> Experiment:
    """Read the one experiment of a YAML config and check its keys and types completely.

    Raises:
        ConfigError: naming file, key, value and remedy, for a missing file, bad YAML, an unknown or mistyped key, or a
            sweep of several experiments.
    """
    experiments = [experiment for experiment, _ in layered_experiments(path)]
    if len(experiments) > 1:
        raise ConfigError(_several(path, experiments))
    return experiments[0]


def _several(path: str | Path, experiments: Sequence[Experiment]) -> str:
    return (
        f"{path}: its sweep states {len(experiments)} experiments, and one is wanted here. Run them all with "
        f"`python -m epsdpo run {path}`, or print each as a config with `python -m epsdpo config --full {path}`"
    )


def load_variant(path: str | Path, overrides: Sequence[str] | None) -> Experiment:
    """The one experiment of a YAML config with values of its own on top, by which it is named and titled as in a sweep.

    Of another method the experiment has those keys of the config that mean something under it.

    Args:
        overrides: `KEY=VALUE` texts, as for `--set`; none for the config as it is.

    Raises:
        ConfigError: as `load_experiment` and `parse_overrides` do.
    """
    if not overrides:
        return load_experiment(path)
    point = parse_overrides(overrides)
    (suffix,) = point_names([point], OVERRIDE)
    stated = _merged(_layers(Path(path))).get("train") or {}
    foreign = keys_of_others(point["method"], stated) if "method" in point else ()
    without = [key for key in foreign if f"train.{key}" not in point]
    experiments = [experiment for experiment, _ in layered_experiments(path, point, without=without)]
    if len(experiments) > 1:
        raise ConfigError(_several(path, experiments))
    (experiment,) = experiments
    # The title of a config says its method.
    title = f"{experiment.method} ({Path(path).name})" if "method" in point else experiment.title
    others = {key: value for key, value in point.items() if key != "method"}
    texts = {"name": _within_limit(experiment.name + suffix), "title": title + point_title(others)}
    return experiment.model_copy(update={key: text for key, text in texts.items() if key not in point})


def _within_limit(name: str) -> str:
    """A name that no file system refuses: of one that is too long the beginning, and a digest of the whole."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{digest}"


def load_experiments(
    paths: str | Path | Iterable[str | Path],
    overrides: Mapping[str, Any] | None = None,
    checked: Checked = (),
) -> list[Experiment]:
    """The experiments of YAML files, and of every `*.yaml` of a folder in the order of their names.

    Files of a folder whose names begin with `_` are there to be extended by others, and are left out.

    Args:
        overrides: dotted keys with the values that they take in every experiment; see `parse_overrides`.
        checked: (method, `train` section) of what was checked before, e.g. of a run folder; others need trl.

    Raises:
        ConfigError: if a folder holds no config, a config is wrong (all problems of all files are listed), or two
            experiments claim one name or title.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    experiments: list[Experiment] = []
    problems: list[str] = []
    for file in (file for path in paths for file in _config_files(Path(path))):
        try:
            experiments += [experiment for experiment, _ in layered_experiments(file, overrides, checked)]
        except ConfigError as error:
            problems += str(error).splitlines()
    # Folders go by name, tables and figures by title: of two runs that share one, one would be lost.
    where = ", ".join(map(str, paths))
    shared_names = _shared(experiment.name for experiment in experiments)
    # Titles default to names, so shared names would be listed twice.
    shared_titles = {} if shared_names else _shared(experiment.title for experiment in experiments)
    problems += [
        f"{where}: {n} configs are named {name!r}; give each its own `name`" for name, n in shared_names.items()
    ]
    problems += [f"{where}: {n} configs are titled {t!r}; give each its own `title`" for t, n in shared_titles.items()]
    if problems:
        # A mistake in a base, or in an override, is the same one in all experiments.
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return experiments


def _config_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.yaml") if not file.name.startswith(BASE_MARK))
    if not files:
        raise ConfigError(
            f"{path}: the folder holds no *.yaml config (files that begin with {BASE_MARK!r} are only for others to "
            "extend)"
        )
    return files


def _shared(values: Iterable[str]) -> dict[str, int]:
    return {value: count for value, count in sorted(Counter(values).items()) if count > 1}


def read_extended(path: str | Path) -> dict[str, Any]:
    """The values of a YAML file on top of those of the files that it extends, whatever its keys mean.

    Raises:
        ConfigError: if one of the files is missing or cannot be read as keys and values.
    """
    values = _merged(_layers(Path(path)))
    values.pop("extends", None)
    return values


def layered_experiments(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    checked: Checked = (),
    without: Sequence[str] = (),
) -> list[tuple[Experiment, Layers]]:
    """The experiments of one file, one for each point of its sweep, each with the layers that it was merged from.

    Args:
        overrides, checked: as for `load_experiments`.
        without: keys of its `train` that are left out.

    Raises:
        ConfigError: as `load_experiments` does.
    """
    path, overrides = Path(path), overrides or {}
    if path.name.startswith(BASE_MARK):
        raise ConfigError(
            f"{path}: a name that begins with {BASE_MARK!r} marks a file that others extend, not an experiment. "
            "Extend it, or rename it"
        )
    files = _layers(path)
    points = sweep_points(_merged(files).get("sweep"), overrides, str(path))
    experiments, problems = [], []
    for point, suffix in zip(points, point_names(points, str(path)), strict=True):
        layers = [*files, (f"{path}: sweep", nested(point)), (OVERRIDE, nested(overrides))]
        values = {"name": path.stem, **_merged(layers)}
        for key in ("extends", "sweep"):
            values.pop(key, None)
        for key in without:
            values["train"].pop(key, None)
        for key, addition in {"name": suffix, "title": point_title(point)}.items():
            # Anything but text is left as it is, for the check to refuse.
            if isinstance(values.get(key), str):
                values[key] += addition
        try:
            experiments.append((check_experiment(values, str(path), layers, checked), layers))
        except ConfigError as error:
            problems += str(error).splitlines()
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return experiments


def _merged(layers: Layers) -> dict[str, Any]:
    return reduce(merged, (values for _, values in layers), {})


def _layers(path: Path, above: Sequence[Path] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A file as the topmost layer on those of the files that it extends, which are read first."""
    chain = [*above, path]
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"{' extends '.join(map(str, chain))}: a config cannot build on itself. Remove one `extends`")
    values = _read_mapping(path, above)
    base = values.get("extends")
    if base is None:
        return [(str(path), values)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends is {base!r} ({type(base).__name__}): write the path of one config")
    below = _layers(path.parent / base, chain)
    # These two say which experiment it is, and this is another one.
    below = [(place, {k: v for k, v in layer.items() if k not in ("name", "title")}) for place, layer in below]
    return [*below, (str(path), values)]


def _read_mapping(path: Path, above: Sequence[Path]) -> dict[str, Any]:
    try:
        values = yaml.load(read_text(path), Loader=_UniqueKeys)
    except FileNotFoundError as error:
        reader = f", which {above[-1]} extends" if above else ""
        raise ConfigError(f"{path}: no such config file{reader}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: {TOO_DEEP}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(values).__name__}")
    if unfit := [f"{path}: {'.'.join(map(str, key))} {problem}" for key, problem in unusable(values)]:
        raise ConfigError("\n".join(unfit))
    return values


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is stated twice, of which YAML by itself silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is stated twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
