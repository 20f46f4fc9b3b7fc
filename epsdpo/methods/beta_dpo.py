"""β-DPO (arXiv 2407.08639) in the shared pass: one β for each batch, and some of its pairs left out.

M_i is the log-ratio margin z - γ of pair i, M_0 and σ are running estimates of its mean and standard deviation:

    M_0 ← m M_0 + (1 - m) E[M]        σ ← m σ + (1 - m) √V[M]
    pairs are kept without replacement, with probability ∝ exp(-(M_i - M_0)² / 2σ²)
    β = max(1e-3, β_0 (1 + α (E[M of the kept pairs] - M_0)))

Where paper and released code differ, or the paper is silent:

- M_i has no factor β_0, as in the released code, whose α = 0.6 belongs to such margins. The paper writes M_i as a
  difference of rewards; give α·β_0 as α to have its reading.
- M_0 and σ start from 0 and take in a batch before they are used on it, as in the released code. Where σ is still 0,
  as in the first step, in which policy and reference are equal, every pair is as likely as any other.
- A batch is all pairs of an optimiser step, over micro-batches and processes; the released code takes each micro-batch
  for itself, so that its β depends on their size.
- V is the variance over the batch, without Bessel's correction.
- Evaluation changes nothing; in the released code it moves M_0 and σ.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from epsdpo.methods.kernels import dpo_loss
from epsdpo.methods.pair_index import REPEATED, ScoredPairs
from epsdpo.methods.trainer import EpsilonDPOTrainer

LOWEST_BETA = 1e-3


@dataclass(frozen=True)
class MarginStatistics:
    """Running mean M_0 and standard deviation σ of the log-ratio margin, in nats."""

    mean: float = 0.0
    std: float = 0.0

    def after(self, margins: np.ndarray, momentum: float) -> "MarginStatistics":
        """The statistics once a batch with these margins (pairs,) has been taken in."""
        return MarginStatistics(
            mean=momentum * self.mean + (1.0 - momentum) * float(margins.mean()),
            std=momentum * self.std + (1.0 - momentum) * float(margins.std()),
        )


def keep_pairs(
    margins: np.ndarray, statistics: MarginStatistics, keep_ratio: float, random: np.random.Generator
) -> np.ndarray:
    """Which pairs of a batch the loss is made of: (pairs,) bool, round(`keep_ratio`·pairs) of them true, at least one.

    Drawing one after another with probabilities ∝ w is taking the largest log w plus Gumbel noise, which bears weights
    that are 0 in floating point.
    """
    kept = max(1, round(keep_ratio * len(margins)))
    log_weights = np.zeros(len(margins))
    if statistics.std > 0.0:
        log_weights = -(((margins - statistics.mean) / statistics.std) ** 2) / 2.0
    order = np.argsort(-(log_weights + random.gumbel(size=len(margins))), kind="stable")
    return np.isin(np.arange(len(margins)), order[:kept])


def batch_beta(beta: float, kept_margins: np.ndarray, statistics: MarginStatistics, alpha: float) -> float:
    """β of a batch from the margins of its kept pairs; `beta` is β_0."""
    return max(LOWEST_BETA, beta * (1.0 + alpha * (float(kept_margins.mean()) - statistics.mean)))


class BetaDPOTrainer(EpsilonDPOTrainer):
    """Trainer for β-DPO (arXiv 2407.08639), called as `EpsilonDPOTrainer` is; data, record and checkpoints are its.

    β and the choice of pairs need the margins of all pairs of an optimiser step. With one micro-batch per step they are
    there when the loss is made; with several, a forward pass of both models over all of them comes first, which costs
    about half of a step's time again. In exchange the run does not depend on micro-batches or processes. The draw
    follows from seed and step alone, so that a resumed run leaves out the same pairs.

    In the record `beta_before` is the β that a step used. Pairs left out of the loss have no β there.
    """

    kept_settings = (*EpsilonDPOTrainer.kept_settings, "margin_alpha", "margin_momentum", "keep_ratio", "seed")

    _tag_names = ["trl", "dpo", "beta-dpo"]
    _name = "β-DPO"

    def __init__(self, *positional, **named):
        self._margins = MarginStatistics()
        self._kept: torch.Tensor | None = None  # indices of the step's pairs that are in its loss, once they are drawn
        super().__init__(*positional, **named)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._kept = None
        if len(batches) > 1:
            with torch.no_grad(), self.compute_loss_context_manager():
                self._draw(pd.concat([self._scored_pairs(self._prepare_inputs(batch)) for batch in batches]))
        return batches, num_items_in_batch

    def _scored_pairs(self, inputs) -> pd.DataFrame:
        """Index and margin of each pair of a micro-batch on all processes."""
        completion_mask = inputs["completion_mask"][:, 1:].bool()
        model_inputs = {key: inputs[key] for key in inputs if key not in ("completion_mask", "pair_index")}
        scores = self._score_completions(self.model_wrapped, model_inputs, completion_mask)
        log_ratios = scores.logps.new_zeros(completion_mask.shape)
        log_ratios = log_ratios.masked_scatter(completion_mask, scores.logps - scores.ref_logps).sum(dim=1)
        chosen, rejected = log_ratios.chunk(2)
        return self._gathered_margins(inputs["pair_index"], chosen - rejected)

    def _gathered_margins(self, pair_index: torch.Tensor, margins: torch.Tensor) -> pd.DataFrame:
        index, margins = self.accelerator.gather((pair_index, margins.detach().double()))
        pairs = pd.DataFrame({"pair_index": index.cpu().numpy(), "margin": margins.cpu().numpy()})
        return pairs[pairs["pair_index"] != REPEATED]

    def _draw(self, pairs: pd.DataFrame) -> None:
        """Take in the margins of a step's pairs, and set its β and which of them are in its loss."""
        args, margins = self.args, pairs["margin"].to_numpy()
        self._margins = self._margins.after(margins, args.margin_momentum)
        kept = keep_pairs(
            margins, self._margins, args.keep_ratio, np.random.default_rng((args.seed, self.state.global_step))
        )
        self.beta = batch_beta(args.beta, margins[kept], self._margins, args.margin_alpha)
        self._kept = torch.from_numpy(pairs["pair_index"].to_numpy()[kept])
        self._window_pairs = len(self._kept)

    def losses(self, scored: ScoredPairs) -> tuple[torch.Tensor, torch.Tensor]:
        training = self.model.training
        if training and self._kept is None:
            self._draw(self._gathered_margins(scored.pair_index, scored.log_ratio_margin))
        beta = torch.full_like(scored.log_ratio_margin, self.beta, requires_grad=False)
        if training:
            beta[~torch.isin(scored.pair_index, self._kept.to(scored.pair_index.device))] = torch.nan
        return dpo_loss(scored.log_ratio_margin, beta.nan_to_num()), beta

    def next_beta(self, pairs: pd.DataFrame) -> float:
        return self.beta  # the next step's follows from the next step's pairs

    def beta_state(self) -> dict[str, Any]:
        return {**super().beta_state(), "margins": asdict(self._margins)}

    def set_beta_state(self, state: dict[str, Any]) -> None:
        super().set_beta_state(state)
        self._margins = MarginStatistics(**state["margins"])
