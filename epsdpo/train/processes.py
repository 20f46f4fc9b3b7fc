"""The processes that train together, on one machine or several: what they must share, and the loss of one of them."""

import os
import platform
import re
import tempfile
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import DistError
from transformers import TrainingArguments

from epsdpo.experiment import ConfigError, Experiment

_FROM_GLOO = re.compile(r"\bgloo\b", re.IGNORECASE)  # which raises RuntimeError and no class of its own


def process_state(experiment: Experiment) -> PartialState:
    """The processes that train together, on the devices that the trainer will use.

    They are brought together here, before the trainer's arguments are, so that `train.ddp_timeout` has to be heeded
    here: how long one waits for another, in preparation and in every step, until it gives up.
    """
    train = experiment.train
    patience = timedelta(seconds=train.get("ddp_timeout", TrainingArguments.ddp_timeout))
    return PartialState(cpu=train.get("use_cpu", False), timeout=patience)


def require_one_folder(folder: Path, processes: PartialState) -> None:
    """Refuse a folder that is not one and the same for all processes, as on machines that share no disk.

    The first process writes what all read there. Checkpoints would be in parts that nobody finds together, and each
    resumed run would begin from the start.

    Raises:
        ConfigError: in every process, naming the machines that do not see it.
    """
    if processes.num_processes == 1:
        return
    name: list[str | None] = [None]
    if processes.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(prefix=".seen-by-all-", dir=folder)
        os.close(descriptor)
        name = [Path(path).name]
    broadcast_object_list(name)
    token = folder / name[0]
    answers = gather_object([(platform.node(), token.exists())])
    if processes.is_main_process:
        token.unlink()
    blind = sorted({machine for machine, sees in answers if not sees})
    if blind:
        raise ConfigError(
            f"{folder.resolve()} on {answers[0][0]} is another folder on {', '.join(blind)}, and a run needs one that "
            "all its machines see. Give --output on a disk that they share, by the same path on each"
        )


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error says that this process cannot reach another one of its training (any more)."""
    return isinstance(error, DistError) or _FROM_GLOO.search(str(error)) is not None


def lost_process(error: RuntimeError, experiment: Experiment) -> str:
    """What to say of `is_lost_process`, with what to look at and how to go on."""
    patience = experiment.train.get("ddp_timeout", TrainingArguments.ddp_timeout)
    return (
        f"{experiment.name}: process {os.environ.get('RANK')}, on {platform.node()}, cannot reach another one of its "
        f"training ({str(error).splitlines()[0]}). The log of the other machines says what ended there; from one that "
        f"says nothing, no answer came for train.ddp_timeout, {patience} s. The same commands on all machines go on "
        "from the last checkpoint. If training had not begun, name the network interface by which the machines reach "
        "each other: in GLOO_SOCKET_IFNAME, for GPUs in NCCL_SOCKET_IFNAME"
    )
