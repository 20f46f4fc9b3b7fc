"""The arguments of KTO."""

from dataclasses import dataclass
from typing import ClassVar

from trl import KTOConfig as TrlKTOConfig

from epsdpo.methods.method_config import MethodConfig


@dataclass
class KTOConfig(MethodConfig, TrlKTOConfig):
    """Configuration of `KTOTrainer`: every key of TRL's `KTOConfig`, with batches stated in pairs.

    Raises:
        ValueError: if a micro-batch has one pair only, or pairs would be dealt in another order than TRL needs.
    """

    rows_per_pair: ClassVar[int] = 2

    def __post_init__(self):
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, key) < 2:
                raise ValueError(
                    f"{key}={getattr(self, key)}: KTO estimates its KL term from the responses to other prompts of "
                    "the micro-batch, so it needs at least 2 pairs. Raise it"
                )
        super().__post_init__()
