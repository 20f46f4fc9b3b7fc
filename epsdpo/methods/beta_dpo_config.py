"""The arguments of β-DPO."""

from dataclasses import dataclass, field
from typing import ClassVar

from epsdpo.methods.config import EpsilonDPOConfig


@dataclass
class BetaDPOConfig(EpsilonDPOConfig):
    """Configuration of `BetaDPOTrainer`: `beta` is β_0, and `epsilon` concerns the recorded decisions alone.

    Raises:
        ValueError: naming the value and the remedy, if a key is out of range.
    """

    _method_name: ClassVar[str] = "β-DPO"

    epsilon_step: float | None = field(
        default=0.0, metadata={"help": "0: β does not follow the decisions of the pairs. [K]"}
    )
    margin_alpha: float = field(
        default=0.6,
        metadata={
            "help": "α of β-DPO: by how much, relative to β, a batch's β rises for each nat by which its mean "
            "log-ratio margin exceeds the running mean; ≥ 0. [K; arXiv 2407.08639, released code]"
        },
    )
    margin_momentum: float = field(
        default=0.9,
        metadata={
            "help": "m of β-DPO: share of the old value that the running mean and standard deviation of the margin "
            "keep at each step; in [0, 1). [K; arXiv 2407.08639]"
        },
    )
    keep_ratio: float = field(
        default=0.8,
        metadata={
            "help": "ρ of β-DPO: share of each batch's pairs that stay in the loss, drawn by how near their margin is "
            "to the running mean; in (0, 1], 1 keeps all. [K; arXiv 2407.08639]"
        },
    )

    def _refusals(self) -> dict[str, tuple[bool, str]]:
        return {
            **super()._refusals(),
            "epsilon_step": (self.epsilon_step != 0.0, "its β has a rule of its own. Remove it"),
        }

    def __post_init__(self):
        super().__post_init__()
        bounds = {
            "margin_alpha": (self.margin_alpha >= 0.0, "be at least 0. The paper uses 0.6"),
            "margin_momentum": (0.0 <= self.margin_momentum < 1.0, "lie in [0, 1). The paper uses 0.9"),
            "keep_ratio": (0.0 < self.keep_ratio <= 1.0, "lie in (0, 1]. The paper uses 0.8"),
        }
        for key, (within, rule) in bounds.items():
            if not within:
                raise ValueError(f"{key}={getattr(self, key)} must {rule}")
