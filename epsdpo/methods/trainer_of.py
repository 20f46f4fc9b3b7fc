"""Which trainer stands behind each method of an experiment.

Trainers are imported when they are asked for: those of TRL that it calls experimental warn on import.
"""

import os

from transformers import Trainer

from epsdpo.methods.catalogue import TRL_LOSSES
from epsdpo.methods.trainer import EpsilonDPOTrainer


def trainer_class(method: str) -> type[Trainer]:
    """The trainer of a method; its arguments are of `epsdpo.methods.other_configs.config_class(method)`."""
    if method == "beta_dpo":
        from epsdpo.methods.batch_beta import BetaDPOTrainer

        return BetaDPOTrainer
    if method in TRL_LOSSES:
        from epsdpo.methods.trl_losses import TrlLossTrainer

        return TrlLossTrainer
    if method == "kto":
        from epsdpo.methods.kto import KTOTrainer

        return KTOTrainer
    if method in ("simpo", "cpo", "orpo"):
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from epsdpo.methods.reference_free import CPOTrainer, ORPOTrainer

        return ORPOTrainer if method == "orpo" else CPOTrainer
    return EpsilonDPOTrainer
