"""The arguments of SimPO, CPO and ORPO, apart because TRL keeps theirs in `trl.experimental`, which warns on import."""

from dataclasses import dataclass
from typing import ClassVar

from trl.experimental.cpo import CPOConfig as TrlCPOConfig
from trl.experimental.orpo import ORPOConfig as TrlORPOConfig

from epsdpo.methods.method_config import MethodConfig


@dataclass
class CPOConfig(MethodConfig, TrlCPOConfig):
    """Configuration of `CPOTrainer`: every key of TRL's `CPOConfig`, and the global batch."""

    has_reference: ClassVar[bool] = False
    tiled_head: ClassVar[bool] = False


@dataclass
class ORPOConfig(MethodConfig, TrlORPOConfig):
    """Configuration of `ORPOTrainer`: every key of TRL's `ORPOConfig`, and the global batch."""

    has_reference: ClassVar[bool] = False
    tiled_head: ClassVar[bool] = False
