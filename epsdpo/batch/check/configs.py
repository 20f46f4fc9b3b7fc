"""`epsdpo check`: what can be verified of a config without a GPU, a network, or any training.

Files and experiments are gone through one by one, each with the findings of all checks on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from epsdpo.batch.check.arithmetic import check_arithmetic
from epsdpo.batch.check.findings import ERROR, NOTE, OK, WARNING, Checked, Finding, text_of
from epsdpo.batch.check.pins import check_sources
from epsdpo.batch.check.texts import check_texts
from epsdpo.batch.check.training import check_training
from epsdpo.experiment import ConfigError
from epsdpo.experiment.load import BASE_MARK, layered_experiments
from epsdpo.models.own_code import own_code

__all__ = ["ERROR", "NOTE", "OK", "WARNING", "Checked", "Finding", "check_configs", "config_files", "text_of"]


def check_configs(
    paths: Iterable[Path], overrides: Mapping[str, Any] | None = None, processes: int = 1
) -> Iterator[Checked]:
    """Findings on every experiment of config files and folders, file by file as they are checked.

    Args:
        overrides: dotted keys with the values that they take in every experiment.
        processes: how many processes the run is meant for.

    Raises:
        ConfigError: if a folder holds no config. What is wrong in a file is a finding.
    """
    for file in config_files(paths):
        try:
            experiments = layered_experiments(file, overrides)
        except ConfigError as error:
            yield Checked(file, [file.stem], [Finding(ERROR, line) for line in str(error).splitlines()])
            continue
        alike: dict[tuple[Finding, ...], list[str]] = {}
        for experiment, layers in experiments:
            own = [Finding(ERROR, problem) for problem in own_code(experiment)]
            findings = (
                *(own or check_training(experiment, processes)),
                *check_arithmetic(experiment, layers),
                *check_sources(experiment),
                *([] if own else check_texts(experiment)),
            )
            alike.setdefault(findings, []).append(experiment.name)
        for findings, names in alike.items():
            yield Checked(file, names, list(findings))


def config_files(paths: Iterable[Path]) -> list[Path]:
    """The configs that are named, or lie at any depth in a folder that is named; not those that others extend.

    Raises:
        ConfigError: if there is none in a folder, or no such path.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
        found = [file for file in found if not (path.is_dir() and file.name.startswith(BASE_MARK))]
        if not found:
            raise ConfigError(f"{path}: the folder holds no *.yaml config")
        files += found
    return files
