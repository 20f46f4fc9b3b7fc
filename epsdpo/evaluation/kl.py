"""How far two models are apart along given responses: KL(p‖q), summed over tokens, exact over the vocabulary.

Reverse KL(π‖π_ref) is that of policy and reference on the policy's responses, forward KL(π_ref‖π) that of reference and
policy on the reference's.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from epsdpo.methods.heads import head_of, require_same_arithmetic
from epsdpo.methods.kernels import token_kl
from epsdpo.models.batches import padded


@dataclass(frozen=True)
class SequenceKL:
    """The divergence along each response.

    Attributes:
        nats: (sequences,) float64, Σ_t KL(p(·|x, y_<t) ‖ q(·|x, y_<t)), each term exact over the vocabulary.
        tokens: (sequences,) int64, how many terms each sum has: the response's tokens, its end token included.
    """

    nats: np.ndarray
    tokens: np.ndarray


@torch.inference_mode()
def sequence_kl(
    model: PreTrainedModel,
    other: PreTrainedModel,
    sequences: list[tuple[list[int], list[int]]],
    batch_size: int,
) -> SequenceKL:
    """KL(p‖q) of `model` p and `other` q, summed along each (prompt ids, response ids), in nats.

    Where the responses were sampled from p itself (temperature 1, top-p 1), the mean over responses is an unbiased
    estimate of the divergence between the two distributions over responses of at most their permitted length: by the
    chain rule, KL(p‖q) = E_{y~p} Σ_t KL(p(·|y_<t) ‖ q(·|y_<t)). Taking the whole next-token distributions instead of
    the sampled tokens' log-ratios keeps every term non-negative and the variance low (Rao-Blackwell). Responses sampled
    otherwise give the divergence along *their* distribution.

    Nothing of size tokens × vocabulary exists beyond one tile.

    Raises:
        ValueError: if the vocabularies differ, or a prompt or response is empty, or if the models are computed in
            different arithmetic.
    """
    require_same_arithmetic(model, other)
    model.eval()
    other.eval()
    head, other_head = head_of(model), head_of(other)
    if len(head.weight) != len(other_head.weight):
        raise ValueError(
            f"the two models have vocabularies of {len(head.weight)} and {len(other_head.weight)} tokens: their "
            "divergence is undefined. Use a policy that was trained from this reference"
        )
    for index, (prompt, response) in enumerate(sequences):
        if not prompt or not response:
            raise ValueError(
                f"sequence {index} has {len(prompt)} prompt and {len(response)} response tokens; need both"
            )
    order = sorted(range(len(sequences)), key=lambda index: sum(map(len, sequences[index])))
    nats = np.zeros(len(sequences))
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch = [sequences[index] for index in members]
        divergences = token_kl(_response_states(model, batch), head, _response_states(other, batch), other_head)
        parts = divergences.double().cpu().split([len(response) for _, response in batch])
        nats[members] = [part.sum().item() for part in parts]
    return SequenceKL(nats, np.array([len(response) for _, response in sequences], dtype=np.int64))


def _response_states(model: PreTrainedModel, batch: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Last hidden states (tokens, hidden) at the positions that predict response tokens, sequence after sequence."""
    ids, attention = padded([prompt + response for prompt, response in batch], pad=0, side="right")
    predicts_response = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response) in enumerate(batch):
        predicts_response[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    states = model.base_model(
        input_ids=ids.to(model.device), attention_mask=attention.to(model.device), use_cache=False
    ).last_hidden_state
    return states[predicts_response.to(states.device)]
