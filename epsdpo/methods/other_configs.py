"""The arguments of each method's trainer: a config of TRL, the global batch, and the method's own keys.

It knows which keys there are and which values make no sense. It imports no trainer, so that what only checks or reads a
config, such as the preparation of data, does not depend on how training is done.
"""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from trl import KTOConfig as TrlKTOConfig
from trl import SFTConfig

from epsdpo.methods.catalogue import TRL_LOSSES
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.methods.method_config import MethodConfig, ResumingConfig

# Options that some of TRL's losses do read; TRL itself refuses the combinations that make no sense.
_MEANT_FOR_LOSSES = ("loss_type", "label_smoothing", "f_divergence_type")


def config_class(method: str) -> type[MethodConfig]:
    """The class of the arguments of a method's trainer."""
    if method in ("simpo", "cpo", "orpo"):
        # On its import TRL warns that these may change between releases; requirements.lock pins one.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from epsdpo.methods.reference_free_configs import CPOConfig, ORPOConfig

        return ORPOConfig if method == "orpo" else CPOConfig
    if method in TRL_LOSSES:
        return TrlLossConfig
    return {"beta_dpo": BetaDPOConfig, "kto": KTOConfig}.get(method, EpsilonDPOConfig)


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


@dataclass
class SFTArguments(ResumingConfig, SFTConfig):
    """The arguments of `epsdpo.train.sft`'s trainer: TRL's, and what it does about an earlier run."""
