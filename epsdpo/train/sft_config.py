"""The arguments of supervised fine-tuning, apart from its command: they are pickled by the address of their module."""

from dataclasses import dataclass

from trl import SFTConfig

from epsdpo.methods.method_config import ResumingConfig


@dataclass
class SFTArguments(ResumingConfig, SFTConfig):
    """TRL's, and what is done about an earlier run."""
