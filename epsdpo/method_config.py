"""`MethodConfig`: what the configs of all methods share, whichever trainer of TRL is behind them.

It knows how one global batch becomes micro-batches on any number of processes, and what a method keeps in memory.
The keys of single methods are added by their own configs, which combine it with a config of TRL.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from accelerate.utils import get_int_from_env

# How torchrun, accelerate and MPI launchers tell a process how many there are.
PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass
class ResumingConfig:
    """What a run does about what an earlier one has left in its output folder; to be combined with a config of TRL."""

    fresh_record: bool = field(
        default=False,
        metadata={
            "help": "Continue although no checkpoint has all the rows of the record that belong to it: what is left of "
            "the record moves to `superseded/`, and a new one, marked as incomplete, begins after the checkpoint. "
            "Without it such a run is refused. [K]"
        },
    )
    start_over: bool = field(
        default=False,
        metadata={
            "help": "Train from the start in an `output_dir` that holds a run: its record and its checkpoints move to "
            "`superseded/`. Without it such a folder is refused. [K]"
        },
    )


@dataclass
class MethodConfig(ResumingConfig):
    """The batch of a run, stated once in pairs; to be combined with a config of TRL, as in `EpsilonDPOConfig`.

    Raises:
        ValueError: if the global batch cannot be split over the processes, with sizes that can.
    """

    has_reference: ClassVar[bool] = True  # whether a second copy of the model is in memory
    tiled_head: ClassVar[bool] = True  # whether logits are made in tiles, and never all at once
    rows_per_pair: ClassVar[int] = 1  # rows of TRL's own batches that one pair fills

    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs per optimiser step, over all processes; `gradient_accumulation_steps` follows from it, so "
            "that the run is the same on one process or many, and need not be given. null: "
            "per_device_train_batch_size × gradient_accumulation_steps × processes, as in TRL. [P: 128 in all runs]"
        },
    )

    def __post_init__(self):
        processes = get_int_from_env(PROCESS_COUNTS, 1)
        if self.global_batch_size is None:
            self.global_batch_size = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes
        else:
            # Before TRL's own checks: DeepSpeed takes the number of accumulation steps from there.
            self.gradient_accumulation_steps = accumulation_steps(
                self.global_batch_size, self.per_device_train_batch_size, processes
            )
        self.per_device_train_batch_size *= self.rows_per_pair
        self.per_device_eval_batch_size *= self.rows_per_pair
        super().__post_init__()
        if self.world_size != processes:
            raise RuntimeError(
                f"the launcher announced {processes} processes ({' or '.join(PROCESS_COUNTS)}), but torch.distributed "
                f"has {self.world_size}. Start the run with `accelerate launch` or torchrun"
            )


def accumulation_steps(global_batch: int, per_device: int, processes: int) -> int:
    """How many micro-batches of `per_device` pairs on each process make one optimiser step of `global_batch` pairs.

    Raises:
        ValueError: if the batch cannot be split so, with sizes that can.
    """
    steps, left_over = divmod(global_batch, per_device * processes)
    if steps == 0 or left_over:
        share, indivisible = divmod(global_batch, processes)
        if indivisible or share == 0:
            remedy = f"Start a number of processes that divides it: {_divisors(global_batch)}"
        else:
            remedy = f"Set per_device_train_batch_size to {_divisors(share)}; it changes speed and memory only"
        raise ValueError(
            f"global_batch_size={global_batch} cannot be split over {processes} "
            f"{'process' if processes == 1 else 'processes'} with per_device_train_batch_size={per_device}. {remedy}"
        )
    return steps


def _divisors(number: int) -> str:
    return " or ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
