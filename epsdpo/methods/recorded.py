"""`RecordsSteps`: lets a trainer of TRL that has no decisions write the same record as the others.

Losses and metrics are TRL's. A value that a method does not have, such as a share of decisions, is missing in the
record, and not 0.
"""

import logging
import time
from typing import Any

import torch
from transformers import TrainerCallback

from epsdpo.methods.evaluations import SeparateEvaluations
from epsdpo.methods.loading import never_running_code
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.methods.resuming import Resumable
from epsdpo.methods.saved_reference import hold_to_policy

logger = logging.getLogger(__name__)

_OF_PAIRS = ("reward_margin", "log_ratio_margin", "chosen_log_ratio", "rejected_log_ratio", "reward_accuracy")


class RecordsSteps(Resumable, SeparateEvaluations):
    """Mixin before a trainer of TRL: logs `kl/beta`, and writes a row of `steps.jsonl` for every optimiser step.

    Raises:
        ValueError: for a reference that is computed in other arithmetic than the policy.
        FloatingPointError: when the loss of a step is not finite; the message names step and β.
    """

    def __init__(self, model, *positional, **named):
        with never_running_code(model if isinstance(model, str) else "the model"):
            super().__init__(model, *positional, **named)
        hold_to_policy(self.model, getattr(self, "ref_model", None), self.accelerator)
        self.record = BetaRecord(self.args.output_dir)
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the optimiser step under way
        self.add_callback(_StepRows(self))

    def margins(self, metrics: dict[str, float]) -> dict[str, float]:
        """What the record says of margins, log-ratios and accuracy of a step; without what the method has not."""
        raise NotImplementedError

    def compute_loss(self, *positional, **named):
        result = super().compute_loss(*positional, **named)
        if self.model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._step_losses.append(loss.detach().float())
        return result

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, "kl/beta": self.beta}
        elif any(key.startswith("eval_") and key.endswith("_loss") for key in logs):  # of a named set too
            logs = {**logs, "eval_kl/beta": self.beta}
        super().log(logs, start_time)

    def step_row(self, metrics: dict[str, float]) -> dict[str, Any]:
        """What the record says of the optimiser step that has ended, from the means of its metrics."""
        loss = self.accelerator.reduce(torch.stack(self._step_losses).mean(), reduction="mean").item()
        self._step_losses.clear()
        if not torch.isfinite(torch.tensor(loss)):
            raise FloatingPointError(
                f"the loss of optimiser step {self.state.global_step} is {loss} (β {self.beta:g}). Lower learning_rate "
                "or max_grad_norm, or use bfloat16 in place of float16; the last checkpoint is unharmed"
            )
        no_decisions = dict.fromkeys(("relaxed", "tied", "tightened", "mean_step"))
        return {
            "beta_before": self.beta,
            "beta_after": self.beta,
            **no_decisions,
            "loss": loss,
            **dict.fromkeys(_OF_PAIRS),
            **self.margins(metrics),
        }


class _StepRows(TrainerCallback):
    """Keeps the record in step with the training loop."""

    def __init__(self, trainer: RecordsSteps):
        self.trainer = trainer
        self.started = 0.0
        self.pairs_seen = 0
        self.logged_before: dict[str, int] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        # Of a training that was interrupted.
        self.trainer._step_losses.clear()
        self.trainer.trl_metrics("train").clear()
        if state.is_world_process_zero:
            self.trainer.begin_record(state)
            self.pairs_seen = 0
            for _ in range(state.global_step):
                self.pairs_seen = self._pairs_seen_after_one_more(args)

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.logged_before = {name: len(values) for name, values in self.trainer.trl_metrics("train").items()}

    def on_step_end(self, args, state, control, **kwargs):
        metrics = {}
        for name, values in self.trainer.trl_metrics("train").items():
            new = values[self.logged_before.get(name, 0) :]
            if new:
                metrics[name] = sum(new) / len(new)
        row = self.trainer.step_row(metrics)
        if state.is_world_process_zero:
            self.pairs_seen = self._pairs_seen_after_one_more(args)
            row |= {"pairs_seen": self.pairs_seen, "seconds": time.perf_counter() - self.started}
            self.trainer.record.append({"step": state.global_step, "epoch": state.epoch, **row})

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.record.finish()

    def _pairs_seen_after_one_more(self, args) -> int:
        """How many pairs were seen after one more step; the last one of an epoch takes what is left of it."""
        pairs_of_epoch = len(self.trainer.train_dataset) // args.rows_per_pair
        return self.pairs_seen + min(args.global_batch_size, pairs_of_epoch - self.pairs_seen % pairs_of_epoch)
