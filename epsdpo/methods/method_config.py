"""`MethodConfig`: what the configs of all methods share, whichever trainer of TRL is behind them.

One global batch becomes micro-batches on any number of processes. A method's own config adds its keys, and combines
this with a config of TRL.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar

from accelerate.utils import get_int_from_env

from epsdpo.methods.former_names import refuse_former_arguments

HALF_PRECISION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")
ON_A_CPU = (
    "On a CPU set bf16=False (and fp16=False) for float32, or use_cpu=True for bfloat16 there; bf16 is TRL's default"
)
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
        TypeError: for a key of trl 0.13 that is gone, with today's.
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

    def __new__(cls, *positional, **named):
        refuse_former_arguments(cls.__name__, named, {field.name for field in fields(cls)})
        return super().__new__(cls)

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
        self._build()
        if self.world_size != processes:
            raise RuntimeError(
                f"the launcher announced {processes} processes ({' or '.join(PROCESS_COUNTS)}), but torch.distributed "
                f"has {self.world_size}. Start the run with `accelerate launch` or torchrun"
            )

    def _build(self):
        """TRL's own part, and what it says of half precision on a machine without a GPU in words that help."""
        try:
            super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            key = "bf16" if self.bf16 else "bf16_full_eval"
            raise ValueError(f"{key}=True: this machine has no GPU that computes in bfloat16. {ON_A_CPU}") from error
        self._require_device()

    def _require_device(self):
        if self.fp16 and self.device.type == "cpu":
            raise ValueError(f"fp16=True: the run is on a CPU, which has no float16. {ON_A_CPU}")


def has_accelerator() -> bool:
    """Whether torch sees a GPU, or what takes the place of one."""
    import torch

    return torch.accelerator.is_available()


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
