"""Every key that a config may use: its dotted name, type in words, default, meaning and source.

They are gathered from the sections and from the methods' configs; only the keys of a file that no experiment keeps,
`extends` and `sweep`, stand here. Trl, which takes seconds to import, is loaded for the keys of `train` alone.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from epsdpo.experiment.schema import STATED_ELSEWHERE, TRAIN_DEFAULTS, Experiment
from epsdpo.experiment.values import value_text
from epsdpo.methods.catalogue import METHODS, config_class, only_under
from epsdpo.methods.errors import ConfigError
from epsdpo.methods.former_names import former_key

TRAIN = "train"
SECTION = "section"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a config: type in words, default as YAML writes it (None: required), meaning with its source."""

    name: str
    kind: str
    default: str | None
    meaning: str


FILE_KEYS = {
    "extends": Key(
        "extends",
        "text",
        "null",
        "Config to build on, relative to this file. Mappings merge, any other value of this file replaces the other's; "
        "name and title are not taken over. [K]",
    ),
    "sweep": Key(
        "sweep",
        "mapping or list",
        "null",
        "One experiment for every combination of values, {train.epsilon: [0.005, 0.01], seed: [1, 2]}, or for every "
        "point of a list, [{train.beta: 0.01, train.epsilon: 0.02}, …]. [K; P: Table 6 is such a grid]",
    ),
}

# What the checks fill in where a config is silent, though the section itself requires the key.
_FILLED_IN = {"name": "the file's name", "title": "the name"}

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@cache
def section_keys() -> dict[str, Key]:
    """All keys but those of `train`, in the order of the sections; sections are keys too."""
    return {**FILE_KEYS, **{key.name: key for key in _keys_of(Experiment, prefix="")}}


@cache
def train_fields(method: str | None = None) -> dict[str, tuple[dataclasses.Field, Any]]:
    """The keys that `train` may hold, without the section's name: dataclass field and type. Ours first, then TRL's.

    Of one method, or of all: where several know a key, ε-DPO says what it is.
    """
    if method is None:
        merged: dict[str, tuple[dataclasses.Field, Any]] = {}
        for one in METHODS:
            merged = {**merged, **{name: entry for name, entry in train_fields(one).items() if name not in merged}}
        return merged
    config = config_class(method)
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}
    types = get_type_hints(config)
    parents = [parent for parent in config.__mro__ if dataclasses.is_dataclass(parent)]
    ours_first = sorted(parents, key=lambda parent: not parent.__module__.startswith("epsdpo."))
    names = dict.fromkeys(name for parent in ours_first for name in parent.__dict__.get("__annotations__", {}))
    return {name: (fields[name], types[name]) for name in names if name in fields and name not in STATED_ELSEWHERE}


def setting_of(experiment: Experiment, key: str) -> Any:
    """What an experiment gives its trainer for a key: as written, or the default; None where the trainer has none."""
    arguments = experiment.training_arguments()
    if key in arguments:
        return arguments[key]
    field = train_fields(experiment.method).get(key)
    return None if field is None else field[0].default


def keys_of_others(method: Any, stated: Iterable[str]) -> list[str]:
    """Which keys of `train` have no effect under a method; none for what is no method, which is refused elsewhere."""
    if method not in METHODS:
        return []
    known = train_fields(method)
    foreign = [key for key in stated if key not in known or method not in only_under(key)]
    return [key for key in foreign if key in train_fields()]


def train_choices(name: str) -> tuple[str, ...]:
    """The texts that a key of `train` may take, where they are numbered; () elsewhere."""
    field, kind = train_fields()[name]
    enums = [part for part in get_args(kind) if isinstance(part, type) and issubclass(part, Enum)]
    return tuple(field.metadata.get("choices") or (member.value for enum in enums for member in enum))


@cache
def train_keys() -> dict[str, Key]:
    """The keys of `train` by their dotted names. Where no other source is stated, the default is TRL's: [T]."""
    keys = {}
    for name, (field, kind) in train_fields().items():
        if choices := train_choices(name):
            kind = Literal[(*choices, None)] if NoneType in get_args(kind) else Literal[choices]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        meaning = " ".join(field.metadata["help"].split())
        keys[f"{TRAIN}.{name}"] = Key(
            f"{TRAIN}.{name}",
            _in_words(kind),
            value_text(TRAIN_DEFAULTS.get(name, default)),
            meaning if meaning.endswith("]") else f"{meaning} [T]",
        )
    return keys


def check_key(name: str, where: str) -> None:
    """Refuse a dotted name that no config knows.

    Raises:
        ConfigError: beginning with `where`, with the nearest right name or the place to state it.
    """
    within = name.removeprefix(f"{TRAIN}.")
    if name in section_keys() or (within != name and within in train_fields()):
        return
    if within != name and within in STATED_ELSEWHERE:
        raise ConfigError(f"{where}: {name} belongs elsewhere: {STATED_ELSEWHERE[within]}")
    if said := former_key(within):
        raise ConfigError(f"{where}: {name.removesuffix(within)}{said}")
    raise ConfigError(f"{where}: {name} is unknown{nearest(name, {**section_keys(), **train_keys()})}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that it most resembles, or where to find them all."""
    known = list(known)
    last = name.rsplit(".", 1)[-1]
    # `beta` alone is nearer to `train.beta` than its letters say.
    matches = [right for right in known if right.endswith(f".{last}")] or difflib.get_close_matches(name, known, n=1)
    if matches:
        return f"; did you mean {' or '.join(map(repr, matches))}?"
    if len(known) > 40:
        return "; `python -m epsdpo config --explain` lists all keys"
    return f"; known keys: {', '.join(sorted(known))}"


def _keys_of(section: type[BaseModel], prefix: str) -> Iterable[Key]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        kind = _in_words(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        yield Key(prefix + name, SECTION if name == TRAIN else kind, _default(name, field), field.description)
        if inner:
            yield from _keys_of(inner, prefix=f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field of this type holds, if it holds one."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _default(name: str, field: FieldInfo) -> str | None:
    if section_of(field.annotation) and (field.is_required() or field.default_factory):
        return "as below"
    if field.is_required():
        return _FILLED_IN.get(name)
    return value_text(field.get_default(call_default_factory=True))


def _in_words(annotation: Any) -> str:
    """A type as a user of YAML would name it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(map(value_text, arguments))
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, arguments)))
    if origin is list:
        return f"list of {_in_words(arguments[0])}"
    if dict in (annotation, origin):
        return "mapping"
    if annotation is NoneType:
        return "null"
    if issubclass(annotation, str):
        return "text"
    return SECTION if issubclass(annotation, BaseModel) else annotation.__name__


def _bounds(constraints: Iterable[Any]) -> str:
    flat = [inner for item in constraints for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    stated = [(item, bound) for item in flat for bound in _BOUNDS if hasattr(item, bound)]
    return " and".join(f" {_BOUNDS[bound]} {getattr(item, bound)}" for item, bound in stated)
