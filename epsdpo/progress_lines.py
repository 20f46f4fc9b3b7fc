"""Progress of a training as plain lines, one for each log, for terminals, log files and headless notebooks."""

import math
import time

from transformers import TrainerCallback, TrainerState


class _Lines(TrainerCallback):
    """Knows how fast this process trains, apart from the steps of an earlier one that it continues."""

    def __init__(self):
        self.started, self.first_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step

    def pace(self, state: TrainerState) -> str:
        seconds = (time.monotonic() - self.started) / max(1, state.global_step - self.first_step)
        left = math.ceil(seconds * (state.max_steps - state.global_step))
        return f"{seconds:.2f} s/step · {left // 60}:{left % 60:02d} left"


class ProgressLines(_Lines):
    """Of preference training: loss, margin, β, and the pairs' decisions where there are any."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        prefix = "eval_" if "eval_loss" in logs else ""
        if not state.is_world_process_zero or f"{prefix}loss" not in logs:
            return  # the summary at the end of training
        line = (
            f"step {state.global_step}/{state.max_steps} · epoch {state.epoch:.2f} · {'eval ' * bool(prefix)}"
            f"loss {logs[prefix + 'loss']:.4f} · margin {logs[prefix + 'rewards/margins']:+.3f} · "
            f"β {logs[prefix + 'kl/beta']:.5g}"
        )
        if prefix + "kl/avg_steps" in logs:  # a method with decisions
            relaxed, tightened = (logs[f"{prefix}kl/{side}_epsilon_steps"] for side in "pn")
            line += f" (β⁻ {relaxed:.0%}, β⁺ {tightened:.0%})"
        if not prefix:
            line += f" · {self.pace(state)}"
        print(line, flush=True)


class LossLines(_Lines):
    """Of SFT: loss, and the share of tokens that the model would have chosen itself."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        print(
            f"step {state.global_step}/{state.max_steps} · epoch {state.epoch:.2f} · loss {logs['loss']:.4f} · "
            f"tokens right {logs['mean_token_accuracy']:.1%} · {self.pace(state)}",
            flush=True,
        )
