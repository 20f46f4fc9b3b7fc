"""`BetaDPOTrainer`: β-DPO in the shared pass, with one β for each batch and some of its pairs left out.

It knows when the margins of a whole batch are known. The equations are in `epsdpo.methods.beta_dpo`.
"""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch

from epsdpo.methods.beta_dpo import MarginStatistics, batch_beta, keep_pairs
from epsdpo.methods.kernels import dpo_loss
from epsdpo.methods.pair_index import REPEATED, ScoredPairs
from epsdpo.methods.trainer import EpsilonDPOTrainer


class BetaDPOTrainer(EpsilonDPOTrainer):
    """Trainer for β-DPO (arXiv 2407.08639), called as `EpsilonDPOTrainer` is; data, record and checkpoints are its.

    β and the choice of pairs need the margins of all pairs of an optimiser step. With one micro-batch per step they are
    there when the loss is made; with several, a forward pass of both models over all of them comes first, which costs
    about half of a step's time again. In exchange the run does not depend on micro-batches or processes. The draw
    follows from seed and step alone, so that a resumed run leaves out the same pairs.

    In the record `beta_before` is the β that a step used. Pairs left out of the loss have no β there.
    """

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

    def _losses(self, scored: ScoredPairs) -> tuple[torch.Tensor, torch.Tensor]:
        training = self.model.training
        if training and self._kept is None:
            self._draw(self._gathered_margins(scored.pair_index, scored.log_ratio_margin))
        beta = torch.full_like(scored.log_ratio_margin, self.beta, requires_grad=False)
        if training:
            beta[~torch.isin(scored.pair_index, self._kept.to(scored.pair_index.device))] = torch.nan
        return dpo_loss(scored.log_ratio_margin, beta.nan_to_num()), beta

    def _next_beta(self, pairs: pd.DataFrame) -> float:
        return self.beta  # the next step's follows from the next step's pairs

    def _beta_settings(self) -> dict[str, Any]:
        keys = ("margin_alpha", "margin_momentum", "keep_ratio", "seed")
        return {**super()._beta_settings(), **{key: getattr(self.args, key) for key in keys}}

    def _beta_state(self) -> dict[str, Any]:
        return {**super()._beta_state(), "margins": asdict(self._margins)}

    def _set_beta_state(self, state: dict[str, Any]) -> None:
        super()._set_beta_state(state)
        self._margins = MarginStatistics(**state["margins"])
