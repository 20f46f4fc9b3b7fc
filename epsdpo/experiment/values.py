"""Nested values and their dotted names: `train.epsilon` is `{"train": {"epsilon": ...}}`.

Plain dictionaries in and out; which names a config may use is the business of `epsdpo.experiment.keys`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import yaml

_EXPONENT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))[eE]([-+]?)(\d+)")


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


def number_advice(value: Any, kind: type = float) -> str:
    """What to write in place of a text that was meant as a number; "" for anything else.

    YAML reads an exponent only after a decimal point and with its sign: 1e9 and 1.0e9 are texts, 1.0e+9 is a number.
    """
    found = _EXPONENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        return ""
    mantissa, sign, exponent = found.groups()
    number = float(value)
    written = f"{mantissa}{'' if '.' in mantissa else '.0'}e{sign or '+'}{exponent}"
    if kind is int and number.is_integer():
        written = str(int(number))
    elif yaml.safe_load(written) != number:  # no digit in front of the point
        written = value_text(number)
    return f"YAML reads an exponent only after a decimal point and with its sign. Write {written}"
