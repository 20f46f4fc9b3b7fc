"""Nested values and their dotted names: `train.epsilon` is `{"train": {"epsilon": ...}}`.

Plain dictionaries in and out; which names a config may use is the business of `epsdpo.experiment.keys`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with `above` on top: mappings merge, anything else (a list, a number, null) replaces what was there."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        result[key] = merged(below[key], value) if both else value
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values at dotted names as nested mappings. No name may lie within another: see `overlap`."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as values at dotted names: the inverse of `nested`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def overlap(one: str, other: str) -> bool:
    """Whether two dotted names state the same value, or one states a part of the other's."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def value_text(value: Any) -> str:
    """A value as a config would write it, for names, titles and tables: 7e-7 as 7.0e-07, which YAML reads back."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").rstrip("\n")
