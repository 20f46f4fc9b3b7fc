"""`RecordsSteps`: lets a trainer of TRL that has no decisions write the same record as the others.

It knows how transformers calls a loss and when a step has ended. Losses and metrics are TRL's; a value that a method
does not have, such as a share of decisions, is missing in the record, and not 0.
"""

import logging
import time
from typing import Any

import torch
from transformers import TrainerCallback

from epsdpo.record import BetaRecord, read_steps

logger = logging.getLogger(__name__)


class RecordsSteps:
    """Mixin before a trainer of TRL: logs `kl/beta`, and writes a row of `steps.jsonl` for every optimiser step.

    Raises:
        FloatingPointError: when the loss of a step is not finite; the message names step and β.
    """

    def __init__(self, *positional, **named):
        super().__init__(*positional, **named)
        self.record = BetaRecord(self.args.output_dir)
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the optimiser step under way
        self.add_callback(_StepRows(self))

    def training_metrics(self) -> dict[str, list[float]]:
        """TRL's metrics since the last log, a value per micro-batch."""
        raise NotImplementedError

    def margins(self, metrics: dict[str, float]) -> dict[str, float | None]:
        """`reward_margin`, `log_ratio_margin` and `reward_accuracy` of a step, None for what the method has not."""
        raise NotImplementedError

    def compute_loss(self, *positional, **named):
        result = super().compute_loss(*positional, **named)
        if self.model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self._step_losses.append(loss.detach().float())
        return result

    def log(self, logs, start_time=None):
        if "loss" in logs or "eval_loss" in logs:
            logs = {**logs, ("kl/beta" if "loss" in logs else "eval_kl/beta"): self.beta}
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
        if state.is_world_process_zero:
            self.trainer.record.rewind(state.global_step)
            self.trainer.record.announce(state.max_steps, state.global_step)
            rows = read_steps(args.output_dir)
            self.pairs_seen = int(rows["pairs_seen"].iloc[-1]) if len(rows) else 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()
        self.logged_before = {name: len(values) for name, values in self.trainer.training_metrics().items()}

    def on_step_end(self, args, state, control, **kwargs):
        metrics = {}
        for name, values in self.trainer.training_metrics().items():
            new = values[self.logged_before.get(name, 0) :]
            if new:
                metrics[name] = sum(new) / len(new)
        row = self.trainer.step_row(metrics)
        if state.is_world_process_zero:
            pairs_of_epoch = len(self.trainer.train_dataset) // args.rows_per_pair
            self.pairs_seen = _pairs_seen(self.pairs_seen, args.global_batch_size, pairs_of_epoch)
            row |= {"pairs_seen": self.pairs_seen, "seconds": time.perf_counter() - self.started}
            self.trainer.record.append({"step": state.global_step, "epoch": state.epoch, **row})

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.record.close()


def _pairs_seen(before: int, batch: int, pairs_of_epoch: int) -> int:
    """How many pairs were seen after one more step; the last one of an epoch takes what is left of it."""
    return before + min(batch, pairs_of_epoch - before % pairs_of_epoch)
