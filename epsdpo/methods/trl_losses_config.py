"""The arguments of the losses that TRL's `DPOTrainer` has beside the sigmoid."""

from dataclasses import dataclass, field
from typing import ClassVar

from epsdpo.methods.catalogue import TRL_LOSSES
from epsdpo.methods.config import EpsilonDPOConfig

# Options that some of TRL's losses do read; TRL itself refuses the combinations that make no sense.
_MEANT_FOR_LOSSES = ("loss_type", "label_smoothing", "f_divergence_type")


@dataclass
class TrlLossConfig(EpsilonDPOConfig):
    """Configuration of `TrlLossTrainer`: `loss_type` names one loss, `epsilon` concerns the recorded decisions alone.

    Raises:
        ValueError: naming the value and the remedy, if an option is set that has no effect on the loss.
    """

    _method_name: ClassVar[str] = "the losses of TRL"

    epsilon_step: float | None = field(default=0.0, metadata={"help": "0: these losses keep β constant. [K]"})

    def __post_init__(self):
        super().__post_init__()
        if len(self.loss_type) != 1 or self.loss_type[0] not in TRL_LOSSES:
            raise ValueError(f"loss_type={self.loss_type!r} is not one of {', '.join(TRL_LOSSES)}")
        if self.loss_type == ["exo_pair"] and not self.label_smoothing > 0.0:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} must be above 0 for exo_pair, which takes its logarithm. "
                "Set it to a small number, e.g. 1.0e-3"
            )

    def _refusals(self) -> dict[str, tuple[bool, str]]:
        refusals = {key: entry for key, entry in super()._refusals().items() if key not in _MEANT_FOR_LOSSES}
        return {**refusals, "epsilon_step": (self.epsilon_step != 0.0, "they keep β constant. Remove it")}
