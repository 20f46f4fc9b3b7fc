"""Progress of a training as plain lines, one for each log, for terminals, log files and headless notebooks."""

import time
from collections import deque

from transformers import TrainerCallback, TrainerState

from epsdpo.train.pace import RECENT, as_time, seconds_left

_SECONDS_OF_SILENCE = 30.0  # at most, as far as there is anything to say


def micro_batch(state: TrainerState, done: int, of: int) -> str:
    """Where an optimiser step stands that is not done yet."""
    return f"step {state.global_step + 1}/{state.max_steps} under way: {done} of {of} micro-batches done"


class _Lines(TrainerCallback):
    """Knows how fast this process trains, apart from the steps of an earlier one that it continues, and breaks long
    silences: of slow steps between two logs, of micro-batches in a slow step, of an evaluation."""

    def __init__(self):
        self.first_step, self.micro_batches, self.evaluated = 0, 0, 0
        self.step_ended = self.last_line = 0.0
        self.seconds: deque[float] = deque(maxlen=RECENT)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.last_line = time.monotonic()

    def break_silence(self, state: TrainerState, line: str) -> None:
        if state.is_world_process_zero and time.monotonic() - self.last_line >= _SECONDS_OF_SILENCE:
            self.say(line)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self.step_ended = self.last_line = time.monotonic()

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        self.break_silence(state, micro_batch(state, self.micro_batches, args.gradient_accumulation_steps))

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self.seconds.append(now - self.step_ended)
        self.step_ended = now
        if not control.should_log:
            self.break_silence(state, f"step {state.global_step}/{state.max_steps} · {self.pace(state)}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self.evaluated += 1
        self.break_silence(state, f"evaluating: {self.evaluated} of {len(eval_dataloader)} batches done")

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated = 0

    def pace(self, state: TrainerState) -> str:
        done = state.global_step - self.first_step
        left = seconds_left(self.seconds, done, state.max_steps - state.global_step)
        pace = f"{sum(self.seconds) / max(1, len(self.seconds)):.2f} s/step"
        return pace if left is None else f"{pace} · {as_time(left)} left"


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
        self.say(line)


class LossLines(_Lines):
    """Of SFT: loss, and the share of tokens that the model would have chosen itself."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.say(
            f"step {state.global_step}/{state.max_steps} · epoch {state.epoch:.2f} · loss {logs['loss']:.4f} · "
            f"tokens right {logs['mean_token_accuracy']:.1%} · {self.pace(state)}"
        )
