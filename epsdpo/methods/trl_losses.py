"""`TrlLossTrainer`: the losses that TRL's `DPOTrainer` has beside the sigmoid, in the shared pass.

The formulas are TRL's own and are run from TRL: its loss gets log-probabilities that are there already in place of the
two models that it would ask for them. Nothing else of TRL's trainer is used; a test holds what that loss reads of it
against what it is given.
"""

from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from epsdpo.methods.pair_index import REPEATED, ScoredPairs
from epsdpo.methods.trainer import EpsilonDPOTrainer
from epsdpo.methods.trl_losses_config import TrlLossConfig


class TrlLossTrainer(EpsilonDPOTrainer):
    """`trl.DPOTrainer` with one of its `loss_type`s, called as `EpsilonDPOTrainer` is; the record and data are its.

    β is constant; the record says which decisions the criterion would have made. Losses, metrics and weights are those
    of `trl.DPOTrainer`, except that an optimiser step is the mean over its pairs however they are dealt. Two losses are
    defined over the micro-batch: `aot` and `aot_unpaired` sort the pairs in it.
    """

    _tag_names = ["trl", "dpo"]
    _name = "DPO"

    def losses(self, scored: ScoredPairs) -> tuple[torch.Tensor, torch.Tensor]:
        counted = scored.pair_index != REPEATED
        losses = torch.zeros_like(scored.log_ratio_margin)
        if counted.any():
            # TRL hands over a mean, so every pair of the micro-batch is recorded with that.
            loss = _TrlLoss(self.args, scored.token_logps.device)(scored, counted.repeat(2))
            losses = loss.expand_as(losses)
        else:
            losses = losses + 0.0 * scored.token_logps.sum()  # a process without a pair still takes part
        return losses, torch.full_like(losses, self.beta, requires_grad=False)


class _TrlLoss(DPOTrainer):
    """The loss of a `DPOTrainer` without the trainer: its method, and the attributes that this reads."""

    def __init__(self, args: TrlLossConfig, device: torch.device):
        # Not TRL's constructor: there is no model and no data here.
        self.args = args
        self.accelerator = SimpleNamespace(device=device, gather=_alone, gather_for_metrics=_alone)
        self.beta = args.beta
        self.loss_types, self.loss_weights = args.loss_type, [1.0]
        self.label_smoothing = args.label_smoothing
        self.f_divergence_type = args.f_divergence_type
        self.f_alpha_divergence_coef = args.f_alpha_divergence_coef
        self.ld_alpha, self.use_weighting = None, False
        self.precompute_ref_logps, self.aux_loss_enabled = False, False
        # Metrics are made elsewhere, of all pairs of a step; those that TRL makes of this batch are thrown away.
        self._metrics = {"train": _Nowhere()}
        self._total_train_tokens, self._tp_size = 0, 1

    def __call__(self, scored: ScoredPairs, sequences: torch.Tensor) -> torch.Tensor:
        """The mean loss of the pairs to which the `sequences` (2·pairs,) bool belong."""
        mask = scored.completion_mask[sequences]
        self.model = _Scored(scored.token_logps[sequences])
        self.ref_model = _Scored(scored.ref_token_logps[sequences])
        inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
        return self._compute_loss(self.model, inputs, return_outputs=False)


class _Scored(torch.nn.Module):
    """Stands where TRL calls a model, and answers with log-probabilities that are known."""

    is_gradient_checkpointing = False

    def __init__(self, token_logps: torch.Tensor):
        super().__init__()
        nothing = torch.zeros_like(token_logps, requires_grad=False)
        self.output = FusedCausalLMOutput(
            log_probs=token_logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    def forward(self, **inputs: Any) -> FusedCausalLMOutput:
        return self.output


class _Nowhere(dict):
    """Metrics that nobody reads: each name is an empty list."""

    def __missing__(self, name: str) -> list:
        return []


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
