"""From plain values to an `Experiment`, with every mistake in one line: place, key, value and remedy.

Names and types are those of the sections and of the methods' configs. Whether values are in range the configs know, and
TRL: the method's own config is built with them, for no machine in particular.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from epsdpo.experiment.keys import FILE_KEYS, nearest, section_of, train_choices, train_fields
from epsdpo.experiment.schema import STATED_ELSEWHERE, Experiment
from epsdpo.experiment.values import number_advice, unusable
from epsdpo.methods.catalogue import config_class
from epsdpo.methods.errors import ConfigError
from epsdpo.methods.former_names import former_key

if TYPE_CHECKING:
    from epsdpo.methods.method_config import MethodConfig

Layers = Sequence[tuple[str, Mapping[str, Any]]]
Checked = Collection[tuple[str, Mapping[str, Any]]]

# They ask for hardware or libraries, which need not be where a config is read.
_OF_THE_MACHINE = ("deepspeed", "fsdp", "fsdp_config", "tf32", "torch_compile")


def check_experiment(values: dict[str, Any], where: str, layers: Layers = (), checked: Checked = ()) -> Experiment:
    """Build an `Experiment` from plain values, e.g. of a YAML file; `where` begins every error message.

    Args:
        layers: (place, values) of each source that `values` were merged from, the last on top. A problem with a key is
            then reported at the place that decided it.
        checked: (method, `train` section) of what was checked before, for which trl need not be loaded again.

    Raises:
        ConfigError: one line for each unknown, missing or mistyped key. Those of `train` are looked at last, since
            that needs trl; values that the trainer's own config refuses are reported once all names are right.
    """
    unfit = [(key, f"{'.'.join(map(str, key))} {problem}") for key, problem in unusable(values)]
    if unfit:
        raise ConfigError("\n".join(f"{place_of(key, layers) or where}: {problem}" for key, problem in unfit))
    values = dict(values)
    values.setdefault("title", values.get("name"))
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        problems = [(problem["loc"], _explain(problem)) for problem in error.errors()]
    else:
        unchecked = (experiment.method, experiment.train) not in checked
        problems = [(("train", key), problem) for key, problem in _train_problems(experiment)] if unchecked else []
    if problems:
        raise ConfigError("\n".join(f"{place_of(key, layers) or where}: {problem}" for key, problem in problems))
    return experiment


def arguments_for_no_machine(experiment: Experiment) -> MethodConfig:
    """The trainer's arguments, checked as for one process on a CPU, without setting anything up for it.

    Raises:
        ValueError: if a value is out of range, or two do not go together.
    """
    import torch

    # Devices and process groups are made when `device` is first read, which the config itself does.
    nowhere = {"device": torch.device("cpu"), "world_size": 1, "_require_device": lambda self: None}
    config = type("NoMachine", (config_class(experiment.method),), nowhere)
    values = {key: value for key, value in experiment.training_arguments().items() if key not in _OF_THE_MACHINE}
    return config(
        **{
            **values,
            "output_dir": "unused",
            "use_cpu": True,
            "disable_tqdm": True,
            "model_init_kwargs": {
                "dtype": experiment.model.dtype,
                "attn_implementation": experiment.model.attn_implementation,
            },
        }
    )


def no_held_out_pairs(arguments: MethodConfig) -> tuple[str, str]:
    """(key of `train`, what is wrong) where evaluation is asked for and no pairs are held out."""
    key = (
        "eval_strategy"
        if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) != "no"
        else "do_eval"
    )
    key = "eval_on_start" if arguments.eval_on_start and not arguments.do_eval else key
    value, remedy = getattr(arguments, key), "'no'" if key == "eval_strategy" else "false"
    return key, (
        f"train.{key} is {str(getattr(value, 'value', value))!r}, but there are no held-out pairs. Set data.eval_split "
        f"(or data.eval_share, to hold a part of the training pairs out), or train.{key}: {remedy}"
    )


def place_of(location: Sequence[Any], layers: Layers) -> str | None:
    """Where the value at a location was decided: the topmost layer that states it, or else what it lies in."""
    for length in range(len(location), 0, -1):
        for place, values in reversed(layers):
            if _states(values, location[:length]):
                return place
    return None


def _states(values: Any, location: Sequence[Any]) -> bool:
    for part in location:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True


def _train_problems(experiment: Experiment) -> list[tuple[str, str]]:
    """(key, problem) for each name, type and choice in `train` that the config of the method does not have."""
    problems = [(key, _train_problem(key, value)) for key, value in experiment.train.items()]
    known = train_fields(experiment.method)
    problems = [
        (key, problem or (None if key in known else _without_effect(key, experiment.method)))
        for key, problem in problems
    ]
    problems = [(key, problem) for key, problem in problems if problem] or list(_not_to_be_continued(experiment.train))
    return problems or _range_problem(experiment)


def _range_problem(experiment: Experiment) -> list[tuple[str, str]]:
    """[(key of `train`, what is wrong with its value)], or [] if the trainer's config takes all values."""
    from epsdpo.methods.method_config import PROCESS_COUNTS

    # Under a launcher this config would take the launcher's settings for its own. There the trainer's arguments, which
    # are built in a moment, are the check.
    if any(name in os.environ for name in (*PROCESS_COUNTS, "ACCELERATE_USE_DEEPSPEED")):
        return []
    try:
        with warnings.catch_warnings(action="ignore"):  # of transformers, about keys of TRL's; training says it again
            arguments = arguments_for_no_machine(experiment)
    except ValueError as error:
        message = " ".join(str(error).split())
        key = re.match(r"(\w+)=", message)
        named = key is not None and key[1] in experiment.train
        return [(key[1] if named else "", f"train.{message}" if key else f"train: {message}")]
    if (arguments.do_eval or arguments.eval_on_start) and not experiment.data.holds_out:
        return [no_held_out_pairs(arguments)]
    return []


def _not_to_be_continued(train: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, problem) for each key with which an interrupted run, which resumes by itself, would go on as another."""
    if train.get("save_only_model"):
        yield (
            "save_only_model",
            "train.save_only_model is True: an interrupted run resumes by itself, which it cannot from weights alone. "
            "Set it to false; save_total_limit: 1 keeps one checkpoint alone, save_strategy: 'no' none",
        )
    if train.get("ignore_data_skip"):
        yield (
            "ignore_data_skip",
            "train.ignore_data_skip is True: an interrupted run, which resumes by itself, would begin again with the "
            "first pairs of its epoch. Set it to false",
        )
    accelerator = train.get("accelerator_config")
    if isinstance(accelerator, Mapping) and accelerator.get("use_seedable_sampler") is False:
        yield (
            "accelerator_config",
            "train.accelerator_config has use_seedable_sampler: false, with which an interrupted run, which resumes by "
            "itself, would take its pairs in another order. Remove it",
        )
    optimizer = train.get("optim") or ""
    if optimizer.endswith(("_layerwise", "lomo")):
        yield (
            "optim",
            f"train.optim is {optimizer!r}, whose state is in no checkpoint, and an interrupted run resumes by itself. "
            "Choose another optimizer",
        )


def _without_effect(key: str, method: str) -> str:
    return f"train.{key} has no effect under method {method!r}. Remove it, also from a file that this one extends"


def _train_problem(key: str, value: Any) -> str | None:
    name, fields = f"train.{key}", train_fields()
    if key in STATED_ELSEWHERE:
        return f"{name} belongs elsewhere: {STATED_ELSEWHERE[key]}"
    if key not in fields and (said := former_key(key)):
        return f"train.{said}"
    if key not in fields:
        return f"{name} is unknown{nearest(key, fields)}"
    choices = train_choices(key)
    if value is False and "no" in choices:
        return f"{name} is False: YAML reads a bare no as false. Write 'no', in quotes"
    try:
        _train_type(key).validate_python(value, strict=True)
    except ValidationError as error:
        return _explain({**error.errors()[0], "loc": ("train", key), "input": value})
    if choices and value is not None and value not in choices:
        near = difflib.get_close_matches(value, choices) or choices
        return f"{name} is {value!r}: choose {' or '.join(map(repr, near))}"
    return None


@cache
def _train_type(key: str) -> TypeAdapter:
    return TypeAdapter(train_fields()[key][1], config=ConfigDict(arbitrary_types_allowed=True))


_NUMBERS = {"int_type": int, "float_type": float}  # pydantic's name of a problem -> what was wanted


def _explain(problem: dict[str, Any]) -> str:
    """One line for one pydantic problem: key, value, remedy."""
    key = ".".join(str(part) for part in problem["loc"])
    value, kind = problem.get("input"), problem["type"]
    if kind == "extra_forbidden":
        return _unknown(key, problem["loc"])
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind in _NUMBERS and (advice := number_advice(value, _NUMBERS[kind])):
        return f"{key} is the text {value!r}, not a number: {advice}"
    return f"{key} is {value!r} ({type(value).__name__}): {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _unknown(key: str, location: tuple) -> str:
    name = str(location[-1])
    if said := former_key(key):
        return said
    if said := former_key(name):
        return f"{key.removesuffix(name)}{said}"
    beside = _keys_beside(location)
    # Last, since it needs trl, for which a misspelt key should not wait.
    if len(location) == 1 and not difflib.get_close_matches(name, beside, n=1) and name in train_fields():
        return f"{key} belongs elsewhere: the section `train`"
    return f"{key} is unknown{nearest(name, beside)}"


def _keys_beside(location: tuple) -> list[str]:
    """The keys that the section of a misspelt key does know."""
    section: type[BaseModel] = Experiment
    for part in location[:-1]:
        section = section_of(section.model_fields[part].annotation)
    return [*section.model_fields, *(FILE_KEYS if section is Experiment else ())]
