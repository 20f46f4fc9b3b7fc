"""The methods that an experiment may name: an entry for each, with its config, its trainer and what it sets of them.

To add a method is to add an entry here and the modules that it names; docs/extending.md does so from beginning to end.
Nothing is imported before it is asked for: names are checked without torch and trl, and a config without its trainer.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

    from epsdpo.methods.method_config import MethodConfig


@dataclass(frozen=True)
class Method:
    """What a method is made of.

    Attributes:
        config, trainer: where their classes are, as "module:name". The fields of the config are the keys of `train`.
        decides: what the method itself sets of its trainer's arguments.
        reads: keys of `train` that have no effect under methods which do not name them here.
        shared_pass: whether it is one pass over policy and reference, with a decision for every pair in the record;
            TRL's own trainers record steps, but no pairs and no decisions.
        beta: what becomes of β, in words for who tries to set its step.
    """

    config: str = "epsdpo.methods.config:EpsilonDPOConfig"
    trainer: str = "epsdpo.methods.trainer:EpsilonDPOTrainer"
    decides: dict[str, Any] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    shared_pass: bool = True
    beta: str = "keeps β constant"


# Plain DPO is ε-DPO with steps of size 0: β stays where it is, while the record still shows which pairs the criterion
# would have moved (the measurement behind the paper's Figure 4a). So do the others that have a reference.
_NO_STEPS = {"epsilon_step": 0.0}
_SMOOTHING, _DIVERGENCE = ("label_smoothing",), ("f_divergence_type", "f_alpha_divergence_coef")

# Losses that TRL 1.16's DPOConfig has under these names, with the keys that each reads. Its "sigmoid" is the method
# dpo, and "sft" is no preference method but a term to add to one.
TRL_LOSSES = {
    "hinge": _DIVERGENCE,
    "ipo": _DIVERGENCE,
    "exo_pair": _SMOOTHING + _DIVERGENCE,
    "nca_pair": (),
    "robust": _SMOOTHING + _DIVERGENCE,
    "bco_pair": (),
    "sppo_hard": (),
    "aot": _SMOOTHING,
    "aot_unpaired": _SMOOTHING,
    "apo_zero": (),
    "apo_down": (),
    "discopop": ("discopop_tau", *_DIVERGENCE),
    "sigmoid_norm": _DIVERGENCE,
}


def _of_trls_dpo(loss: str, reads: tuple[str, ...]) -> Method:
    return Method(
        config="epsdpo.methods.trl_losses_config:TrlLossConfig",
        trainer="epsdpo.methods.trl_losses:TrlLossTrainer",
        decides={**_NO_STEPS, "loss_type": [loss]},
        reads=reads,
    )


def _without_reference(kind: str, decides: dict[str, Any], reads: tuple[str, ...]) -> Method:
    return Method(
        config=f"epsdpo.methods.reference_free_config:{kind}Config",
        trainer=f"epsdpo.methods.reference_free:{kind}Trainer",
        decides=decides,
        reads=reads,
        shared_pass=False,
    )


CATALOGUE = {
    "dpo": Method(decides=_NO_STEPS),
    "epsilon_dpo": Method(reads=("beta_update",)),
    "tr_dpo": Method(
        decides={**_NO_STEPS, "sync_ref_model": True}, reads=("ref_model_mixup_alpha", "ref_model_sync_steps")
    ),
    "beta_dpo": Method(
        config="epsdpo.methods.beta_dpo_config:BetaDPOConfig",
        trainer="epsdpo.methods.beta_dpo:BetaDPOTrainer",
        decides=_NO_STEPS,
        beta="sets β batch by batch",
    ),
    **{loss: _of_trls_dpo(loss, reads) for loss, reads in TRL_LOSSES.items()},
    # SimPO is TRL's CPO without its term on the chosen responses.
    "simpo": _without_reference("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}, ("simpo_gamma", *_SMOOTHING)),
    "cpo": _without_reference("CPO", {"loss_type": "sigmoid"}, ("cpo_alpha", *_SMOOTHING)),
    "orpo": _without_reference("ORPO", {}, ()),
    "kto": Method(
        config="epsdpo.methods.kto_config:KTOConfig", trainer="epsdpo.methods.kto:KTOTrainer", shared_pass=False
    ),
}

METHODS = tuple(CATALOGUE)
SHARED_PASS = tuple(name for name, method in CATALOGUE.items() if method.shared_pass)
# What the criterion of these decisions is where a config does not say: the defaults of `EpsilonDPOConfig`.
CRITERION_DEFAULTS = {"epsilon": 0.01, "criterion_dtype": "float32"}

NO_METHODS = {
    "sigmoid": "TRL's sigmoid loss is method dpo",
    "sft": "it uses the chosen responses alone, so it is no preference method",
    "kto_pair": "TRL no longer has it; its successor is method kto",
    "slic": "TRL has SLiC's loss as method hinge; its calibration term it has not",
    "slic_hf": "TRL has SLiC's loss as method hinge; its calibration term it has not",
    "rrhf": "TRL 1.16 does not have it",
    "rdpo": "TRL 1.16 does not have it",
    "r_dpo": "TRL 1.16 does not have it",
}


def only_under(key: str) -> tuple[str, ...]:
    """The methods under which a key of `train` has an effect."""
    return tuple(name for name, method in CATALOGUE.items() if key in method.reads) or METHODS


def decided_by(method: str) -> dict[str, Any]:
    """What a method sets of its trainer's arguments."""
    return CATALOGUE[method].decides


def code_of(method: str) -> list[tuple[str, str]]:
    """Module and name of a method's config, then of its trainer; nothing is loaded for it."""
    return [tuple(place.split(":")) for place in (CATALOGUE[method].config, CATALOGUE[method].trainer)]


def config_class(method: str) -> type[MethodConfig]:
    """The class of the arguments of a method's trainer."""
    return _loaded(*code_of(method)[0])


def trainer_class(method: str) -> type[Trainer]:
    """The trainer of a method."""
    return _loaded(*code_of(method)[1])


def _loaded(module: str, name: str) -> Any:
    # TRL warns on import that what it calls experimental may change between releases; requirements.lock pins one.
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return getattr(importlib.import_module(module), name)
