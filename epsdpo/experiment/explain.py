"""Configs as text for a reader: what each key means, and which experiments a config comes to."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from epsdpo.experiment.keys import TRAIN, Key, check_key, section_keys, train_keys
from epsdpo.experiment.saved import experiment_text
from epsdpo.experiment.schema import Experiment
from epsdpo.experiment.values import flatten, value_text

WIDTH = 110

_LEGEND = """\
Sources: [P] the paper, arXiv 2502.13177 · [R] its released code and configuration · [T] TRL and transformers ·
[K] this kit's own choice. The values of the paper's runs stand in configs/paper, each with its source."""


def explain_keys(name: str = "") -> str:
    """Every key with type, default, meaning and source, section by section; with `name`, those that it begins.

    `name` may leave out the section: `epsilon` finds `train.epsilon` and `train.epsilon_step`.

    Raises:
        ConfigError: if there is no such key, with the nearest one.
    """
    chosen: list[Key] = []
    for key in section_keys().values():
        if key.name.startswith(name):
            chosen += [key, *(train_keys().values() if key.name == TRAIN else ())]
    if not chosen:
        keys = [*section_keys().values(), *train_keys().values()]
        chosen = [key for key in keys if key.name.startswith(name)]
        chosen = chosen or [key for key in keys if key.name.rsplit(".", 1)[-1].startswith(name)]
    if not chosen:
        check_key(name, "--explain")
    return "\n\n".join([_LEGEND, *map(_explained, chosen)])


def list_experiments(experiments: Sequence[Experiment]) -> str:
    """A table of experiments: what they are, and every key in which they differ."""
    rows = [flatten(experiment.model_dump()) for experiment in experiments]
    shown = {
        "name": "name",
        "title": "title",
        "method": "method",
        "model": "model.name_or_path",
        "data": "data.source",
        "seed": "seed",
    }
    for key in dict.fromkeys(key for row in rows for key in row):
        if key not in shown.values() and any(row.get(key) != rows[0].get(key) for row in rows):
            shown[key] = key
    # An experiment has no value where it leaves a key of `train` to TRL, or a whole section out.
    table = [list(shown), *([value_text(row[key]) if key in row else "–" for key in shown.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table)


def full_text(experiments: Sequence[Experiment]) -> str:
    """The resolved configs as YAML documents, each of which `load_experiment` reads back."""
    return "---\n".join(map(experiment_text, experiments)).rstrip("\n")


def _explained(key: Key) -> str:
    default = "required" if key.default is None else f"default: {key.default}"
    head = textwrap.fill(f"{key.name}  ({key.kind}; {default})", WIDTH, subsequent_indent="    ")
    meaning = textwrap.fill(key.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return f"{head}\n{meaning}"
