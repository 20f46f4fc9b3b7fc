"""Nested values and their dotted names: `train.epsilon` is `{"train": {"epsilon": ...}}`. Dictionaries in and out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from epsdpo.files import is_writable

DEEPEST = 20  # more than any key takes
TOO_DEEP = f"nested more than {DEEPEST} deep. Write it flat"

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


def unusable(values: Any) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(where, what is wrong) for each value of nested ones that nothing could be done with, whatever its key means.

    It does not recurse, so that it can be asked first.
    """
    pending: list[tuple[tuple[Any, ...], Any]] = [((), values)]
    deepest: dict[int, int] = {}  # at which each mapping and list was met; YAML's aliases make one stand in many places
    while pending:
        place, value = pending.pop()
        if isinstance(value, (Mapping, list)):
            if deepest.get(id(value), -1) >= len(place):
                continue
            deepest[id(value)] = len(place)
        if len(place) > DEEPEST:
            yield place[:1], f"is {TOO_DEEP}"
            return
        if isinstance(value, Mapping):
            pending += [((*place, key), inner) for key, inner in value.items()]
            pending += [((*place, ascii(key)), key) for key in value]
        elif isinstance(value, list):
            pending += [((*place, number), inner) for number, inner in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            yield place, f"is {value}, which is no finite number. Write one, or leave the key out"
        elif isinstance(value, str) and not is_writable(value):
            yield place, f"is {value!a}, which holds half a character (a surrogate). Write the character itself"
        elif isinstance(value, str) and "\0" in value:
            yield place, f"is {value!r}, which holds control characters (a zero byte). Remove them"


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
