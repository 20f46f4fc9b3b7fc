"""Whether the trainer will take the values of `train`: its own config is built with them, for no machine in particular.

Which values are out of range is known to the configs of `epsdpo.methods.other_configs` and to TRL. This module only
asks them, without looking at devices or starting processes.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING

from epsdpo.experiment.schema import Experiment

if TYPE_CHECKING:
    from epsdpo.methods.method_config import MethodConfig

# They ask for hardware or libraries, which need not be where a config is read.
_OF_THE_MACHINE = ("deepspeed", "fsdp", "fsdp_config", "tf32", "torch_compile")


def arguments_for_no_machine(experiment: Experiment) -> MethodConfig:
    """The trainer's arguments, checked as for one process on a CPU, without setting anything up for it.

    Raises:
        ValueError: if a value is out of range, or two do not go together.
    """
    import torch

    from epsdpo.methods.other_configs import config_class

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


def range_problem(experiment: Experiment) -> list[tuple[str, str]]:
    """[(key of `train`, what is wrong with its value)], or [] if the trainer's config takes all values."""
    from epsdpo.methods.method_config import PROCESS_COUNTS

    # What a launcher says would be taken for this attempt's; behind it the trainer's own arguments are built at once.
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
