"""Frozen models of a run, and what the criterion of Eq. 5 decides on them: no trainer, no gradients."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from epsdpo.experiment import Experiment
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.methods.heads import expose_hidden_states, head_of, require_same_arithmetic
from epsdpo.methods.kernels import Arithmetic, pair_steps, score_tokens
from epsdpo.methods.loading import load_causal_lm


def load_frozen(
    experiment: Experiment, source: str, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """A model of the experiment on `device`, ready for `decisions_at`."""
    model = load_causal_lm(
        source,
        revision=revision,
        dtype=getattr(torch, experiment.model.dtype),
        attn_implementation=experiment.model.attn_implementation,
    )
    expose_hidden_states(model)
    return model.to(device).eval()


def precision_of(arguments: EpsilonDPOConfig) -> torch.autocast:
    """The mixed precision of the run, so that hidden states are rounded as in training."""
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    return torch.autocast(arguments.device.type, dtype, enabled=arguments.fp16 or arguments.bf16)


@torch.no_grad()
def decisions_at(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    epsilons: Sequence[float],
    arithmetic: Arithmetic,
) -> np.ndarray:
    """The decision of each pair at each ε, (epsilons, pairs) int64, as `pair_steps` has it.

    Args:
        policy, reference: both after `expose_hidden_states`; each runs once.
        batch: input_ids, attention_mask and completion_mask, (2·pairs, sequence): chosen first, then rejected.
        arithmetic: of the criterion, as in training.
    """
    hidden, ref_hidden, labels, completion_mask = completion_states(policy, reference, batch)
    heads = head_of(policy), head_of(reference)
    steps = []
    for epsilon in epsilons:
        scores = score_tokens(hidden, heads[0], ref_hidden, heads[1], labels, epsilon, arithmetic)
        per_token = scores.criterion.new_zeros(3, *completion_mask.shape)
        per_token.masked_scatter_(completion_mask.expand_as(per_token), scores.criterion)
        steps.append(pair_steps(per_token.sum(dim=2), arithmetic.criterion))
    return torch.stack(steps).cpu().numpy()


@torch.no_grad()
def completion_states(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both models' last hidden states where completion tokens are predicted, these tokens, and where they stand.

    Args:
        policy, reference, batch: as for `decisions_at`.

    Returns:
        (tokens, hidden) of policy and of reference, (tokens,) labels, (2·pairs, sequence - 1) mask of the tokens.

    Raises:
        ValueError: if the two are computed in different arithmetic.
    """
    require_same_arithmetic(policy, reference)
    hidden, ref_hidden = hidden_states(policy, batch), hidden_states(reference, batch)
    completion_mask, labels = completion_tokens(batch, policy.device)
    return hidden, ref_hidden, labels, completion_mask


def hidden_states(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One model's (tokens, hidden) of `completion_states`."""
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    completion_mask, _ = completion_tokens(batch, model.device)
    return model(**inputs, on_hidden_states=lambda states, _: states[:, :-1][completion_mask])


def completion_tokens(batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of `completion_states` and its labels."""
    completion_mask = batch["completion_mask"][:, 1:].bool().to(device)
    return completion_mask, batch["input_ids"][:, 1:].to(device)[completion_mask]
