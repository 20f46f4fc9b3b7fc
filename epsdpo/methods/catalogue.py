"""The methods that an experiment may name, and which keys of `train` mean something under which of them.

Plain data: names, what each method decides for its trainer, and why a name or key is refused. The trainers themselves
are in `epsdpo.methods`.
"""

from __future__ import annotations

from typing import Any

# Losses that TRL 1.16's DPOConfig has under these names. Its "sigmoid" is the method dpo, and "sft" is no preference
# method but a term to add to one.
TRL_LOSSES = (
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
)

# One pass over policy and reference, with a decision for every pair in the record.
SHARED_PASS = ("dpo", "epsilon_dpo", "tr_dpo", "beta_dpo", *TRL_LOSSES)
# What the criterion of these decisions is where a config does not say: the defaults of `epsdpo.methods.config`.
CRITERION_DEFAULTS = {"epsilon": 0.01, "criterion_dtype": "float32"}
# TRL's own trainers: the record has steps, but no pairs and no decisions.
REFERENCE_FREE = ("simpo", "cpo", "orpo")
METHODS = (*SHARED_PASS, *REFERENCE_FREE, "kto")

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

_LOSSES_WITH_SMOOTHING = ("robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo")
_LOSSES_WITH_DIVERGENCE = ("hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")

# Keys that a trainer's config has, but that only these methods read.
ONLY_UNDER = {
    "beta_update": ("epsilon_dpo",),
    "ref_model_mixup_alpha": ("tr_dpo",),
    "ref_model_sync_steps": ("tr_dpo",),
    "label_smoothing": _LOSSES_WITH_SMOOTHING,
    "discopop_tau": ("discopop",),
    "f_divergence_type": _LOSSES_WITH_DIVERGENCE,
    "f_alpha_divergence_coef": _LOSSES_WITH_DIVERGENCE,
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
}


def decided_by(method: str) -> dict[str, Any]:
    """What a method decides of its trainer's arguments.

    Plain DPO is ε-DPO with steps of size 0: β stays where it is, while the record still shows which pairs the criterion
    would have moved (the measurement behind the paper's Figure 4a). So do the others that have a reference.
    """
    if method == "epsilon_dpo":
        return {}
    if method in SHARED_PASS:
        moving = {"sync_ref_model": True} if method == "tr_dpo" else {}
        loss = {"loss_type": [method]} if method in TRL_LOSSES else {}
        return {"epsilon_step": 0.0, **moving, **loss}
    # SimPO is TRL's CPO without its term on the chosen responses.
    return {"simpo": {"loss_type": "simpo", "cpo_alpha": 0.0}, "cpo": {"loss_type": "sigmoid"}}.get(method, {})


def code_of(method: str) -> list[tuple[str, str]]:
    """Modules and names of what a method is made of, its config and its trainer; nothing is loaded for it."""
    config, trainer = {
        "beta_dpo": ("other_configs:BetaDPOConfig", "batch_beta:BetaDPOTrainer"),
        "kto": ("other_configs:KTOConfig", "kto:KTOTrainer"),
        "orpo": ("reference_free_configs:ORPOConfig", "reference_free:ORPOTrainer"),
        **dict.fromkeys(("simpo", "cpo"), ("reference_free_configs:CPOConfig", "reference_free:CPOTrainer")),
        **dict.fromkeys(TRL_LOSSES, ("other_configs:TrlLossConfig", "trl_losses:TrlLossTrainer")),
    }.get(method, ("config:EpsilonDPOConfig", "trainer:EpsilonDPOTrainer"))
    return [tuple(f"epsdpo.methods.{place}".split(":")) for place in (config, trainer)]
