"""The implementation that is asked: its classes, and what it calls ε and β."""

import importlib
import inspect
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from epsdpo.experiment import ConfigError
from epsdpo.files import read_text

KEYS = ("args_class", "epsilon", "beta", "args")


@dataclass(frozen=True)
class Subject:
    """An implementation of ε-DPO by TRL's calling convention.

    Attributes:
        trainer: made with model, ref_model, args, train_dataset, eval_dataset, processing_class and callbacks.
        args_class: of its arguments.
        epsilon: the argument that holds ε.
        beta: the attribute of the trainer that holds β as it moves, with dots where it lies deeper.
        args: further arguments.
    """

    trainer: type
    args_class: type
    epsilon: str = "epsilon"
    beta: str = "beta"
    args: dict[str, Any] = field(default_factory=dict)

    def beta_of(self, trainer: Any) -> float | None:
        """β as it stands, or None where there is no such attribute."""
        for name in self.beta.split("."):
            trainer = getattr(trainer, name, None)
        try:
            return float(trainer)
        except (TypeError, ValueError):
            return None


def load_subject(name: str, config: Path | None = None) -> Subject:
    """Import MODULE:TRAINER, from the working directory too, with what a config file says of it.

    Raises:
        ConfigError: naming value, place and remedy, if there is no such thing.
    """
    values = _read(config) if config else {}
    sys.path.insert(0, str(Path.cwd()))
    trainer = _named(name, "conform")
    if "args_class" in values:
        values["args_class"] = _named(values["args_class"], f"{config}: args_class")
    else:
        values["args_class"] = _annotated(trainer, name)
    return Subject(trainer, **values)


def _read(config: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_text(config)) or {}
    except OSError as error:
        raise ConfigError(f"{config}: {error.strerror}. --config is the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{config}: is no YAML ({error}). It has lines such as `epsilon: eps`") from None
    wanted = {"args_class": str, "epsilon": str, "beta": str, "args": dict}
    if not isinstance(values, dict) or (unknown := values.keys() - wanted.keys()):
        found = ", ".join(map(str, unknown)) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(f"{config}: {found} is none of its keys. It may have {', '.join(KEYS)}")
    for key, value in values.items():
        if not isinstance(value, wanted[key]):
            raise ConfigError(
                f"{config}: {key} is {value!r}. Give it {'names and values' if key == 'args' else 'a name'}"
            )
    return values


def _named(name: str, place: str) -> type:
    module_name, colon, class_name = name.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigError(f"{place}: {name!r} is not MODULE:CLASS, as epsdpo:EpsilonDPOTrainer is")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{place}: {module_name} cannot be imported: it needs {error.name}. Install that"
            ) from error
        raise ConfigError(
            f"{place}: there is no module {module_name!r}, as {name!r} says. Start where it can be imported from, "
            "or put its folder into PYTHONPATH"
        ) from None
    except Exception as error:  # whatever a module of somebody's does when it is imported
        raise ConfigError(f"{place}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        classes = sorted(each for each, value in vars(module).items() if inspect.isclass(value))
        raise ConfigError(f"{place}: {module_name} has no class {class_name!r}. It has {', '.join(classes) or 'none'}")
    return found


def _annotated(trainer: type, name: str) -> type:
    """The class that the trainer's own `args` is annotated with."""
    try:
        hint = typing.get_type_hints(trainer.__init__).get("args")
    except Exception:  # of names that its module does not have
        hint = None
    classes = [each for each in (hint, *typing.get_args(hint)) if inspect.isclass(each) and each is not type(None)]
    if not classes:
        raise ConfigError(
            f"conform: {name} does not say of which class its args are. Give args_class: MODULE:CLASS in --config"
        )
    return classes[0]
