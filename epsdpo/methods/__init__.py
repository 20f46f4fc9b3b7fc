"""Which trainer and config of arguments stand behind each method of an experiment.

The trainers are imported when they are asked for: TRL warns on import of those that it calls experimental.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from epsdpo.experiment.methods import TRL_LOSSES

if TYPE_CHECKING:
    from epsdpo.method_config import MethodConfig


def trainer_and_config(method: str) -> tuple[type, type[MethodConfig]]:
    """The trainer class of a method, and the class of its arguments."""
    if method == "beta_dpo":
        from epsdpo.methods.batch_beta import BetaDPOConfig, BetaDPOTrainer

        return BetaDPOTrainer, BetaDPOConfig
    if method in TRL_LOSSES:
        from epsdpo.methods.trl_losses import TrlLossConfig, TrlLossTrainer

        return TrlLossTrainer, TrlLossConfig
    if method == "kto":
        from epsdpo.methods.kto import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig
    if method in ("simpo", "cpo", "orpo"):
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # requirements.lock pins the TRL it was tested with
        from epsdpo.methods.reference_free import CPOConfig, CPOTrainer, ORPOConfig, ORPOTrainer

        return (ORPOTrainer, ORPOConfig) if method == "orpo" else (CPOTrainer, CPOConfig)
    from epsdpo.config import EpsilonDPOConfig
    from epsdpo.trainer import EpsilonDPOTrainer

    return EpsilonDPOTrainer, EpsilonDPOConfig
