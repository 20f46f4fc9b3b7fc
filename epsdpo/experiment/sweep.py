"""Many experiments from one config: the points of its `sweep`, what they are called, and overrides by `--set`.

Points and overrides are mappings from dotted keys to values.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from epsdpo.experiment.keys import FILE_KEYS, check_key
from epsdpo.experiment.values import TOO_DEEP, overlap, unusable, value_text
from epsdpo.methods.errors import ConfigError

OVERRIDE = "--set"

Point = dict[str, Any]

_WORLD = re.compile(r"-seed(\d+)$")  # at the end of a name, as `point_names` leaves it

# How titles name the keys that the paper has letters for.
_LETTERS = {"train.beta": "β", "train.epsilon": "ε"}


def parse_overrides(arguments: Iterable[str]) -> Point:
    """`KEY=VALUE` texts as dotted keys with values, read as YAML reads them.

    Raises:
        ConfigError: for a text without key or value, an unknown key, or keys that state one thing twice.
    """
    overrides: Point = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        where = f"{OVERRIDE} {argument}"
        if not (key and equals and text.strip()):
            raise ConfigError(f"{where}: write KEY=VALUE, e.g. train.epsilon=0.02, and KEY=null for no value")
        if key in FILE_KEYS:
            raise ConfigError(f"{where}: {key} belongs in a config file. Write a file that extends yours")
        check_key(key, where)
        _refuse_overlap([*overrides, key], where)
        try:
            overrides[key] = yaml.safe_load(text)
        except RecursionError as error:
            raise ConfigError(f"{OVERRIDE} {key}: the value is {TOO_DEEP}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{where}: the value is not readable as YAML; put it in quotes ({error})") from error
        for place, problem in unusable({key: overrides[key]}):
            raise ConfigError(f"{OVERRIDE}: {'.'.join(map(str, place))} {problem}")
    return overrides


def sweep_points(sweep: Any, overrides: Iterable[str], where: str) -> list[Point]:
    """The points of a `sweep`, in the order in which it states them; of a mapping, the last key varies fastest.

    Args:
        sweep: a mapping of dotted keys to lists of values, for all their combinations; a list of points; or None for
            no sweep, whose one point is empty.
        overrides: dotted keys that are decided from outside, and so cannot vary.

    Raises:
        ConfigError: beginning with `where`, naming key, value and remedy.
    """
    if sweep is None:
        return [{}]
    where = f"{where}: sweep"
    if not sweep or not isinstance(sweep, (dict, list)):
        raise ConfigError(
            f"{where} is {sweep!r}: write keys with lists of values, {{train.epsilon: [0.005, 0.01]}}, a list of "
            "points, [{train.epsilon: 0.005}, {train.epsilon: 0.01}], or null for no sweep"
        )
    if isinstance(sweep, dict):
        for key, values in sweep.items():
            if not values or not isinstance(values, list):
                raise ConfigError(f"{where}: {key} is {values!r}: write a list of at least one value")
        points = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    else:
        for point in sweep:
            if not point or not isinstance(point, dict):
                raise ConfigError(f"{where}: the point {point!r} is no mapping; write e.g. {{train.epsilon: 0.01}}")
        points = sweep
    _check_keys({str(key) for point in points for key in point}, set(overrides), where)
    for point in points:
        _refuse_overlap(list(point), where)
    return points


def point_names(points: list[Point], where: str) -> list[str]:
    """What each point adds to the name of its experiment, e.g. `-epsilon0.005-seed1`.

    Raises:
        ConfigError: if two points would have one name.
    """
    keys = dict.fromkeys(key for point in points for key in point)
    short = _short_names(keys)
    names = ["".join(f"-{_joined(short[key], value)}" for key, value in point.items()) for point in points]
    for name, count in Counter(names).items():
        if count > 1:
            same = [point for point, other in zip(points, names, strict=True) if other == name]
            raise ConfigError(f"{where}: sweep: the points {same} would all be called {name!r}. Remove all but one")
    return names


def point_title(point: Point) -> str:
    """What a point adds to the title of its experiment, e.g. `, ε=0.005, seed=1`."""
    short = _short_names(point)
    return "".join(f", {_LETTERS.get(key, short[key])}={value_text(value)}" for key, value in point.items())


def recipe_and_world(name: str) -> tuple[str, int | None]:
    """An experiment's name without its `-seedN`, and N; None for an experiment that is not swept over worlds."""
    found = _WORLD.search(name)
    return (name[: found.start()], int(found[1])) if found else (name, None)


def _check_keys(keys: Iterable[str], overrides: Iterable[str], where: str) -> None:
    for key in sorted(keys):
        if key in ("name", "title", *FILE_KEYS):
            raise ConfigError(f"{where}: {key} cannot be swept. Names and titles follow from the values that are")
        check_key(key, where)
        for override in overrides:
            if overlap(key, override):
                raise ConfigError(
                    f"{where}: {key} is swept, and {OVERRIDE} {override} would decide it. Leave {OVERRIDE} out, or "
                    "turn the sweep off with `sweep: null` in a file that extends this one"
                )


def _refuse_overlap(keys: list[str], where: str) -> None:
    for one, other in itertools.combinations(keys, 2):
        if overlap(one, other):
            raise ConfigError(f"{where}: {one} and {other} state the same value. Remove one of them")


def _short_names(keys: Iterable[str]) -> Mapping[str, str]:
    """The last part of each dotted key, or all of it where two keys share that."""
    last = {key: key.rsplit(".", 1)[-1] for key in keys}
    shared = [name for name in last.values() if list(last.values()).count(name) > 1]
    return {key: key if name in shared else name for key, name in last.items()}


def _joined(name: str, value: Any) -> str:
    """Key and value as part of a folder's name; a dash keeps apart what would run together: words, and two numbers."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", value_text(value).replace("e+", "e"))
    if not isinstance(value, (int, float)):  # whose leading dash is a minus
        text = text.strip("-")
    return f"{name}{text}" if text[:1].isdigit() and not name[-1:].isdigit() else f"{name}-{text}"
