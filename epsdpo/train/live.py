"""The chart that moves while a run trains in JupyterLab.

It reads the β record that the trainer writes anyway, so it can neither slow a step down much nor change a run, and
needs not know in which process that runs.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from IPython.display import DisplayHandle, Image, Pretty, display
from matplotlib.figure import Figure
from transformers import TrainerCallback

from epsdpo.methods.record import STEPS_FILE, DamagedRecord, read_done_before, read_steps, read_total_steps
from epsdpo.plots.saving import as_image
from epsdpo.plots.trajectory import live
from epsdpo.train.pace import as_time, seconds_left
from epsdpo.train.progress_lines import micro_batch


class LiveChart(TrainerCallback):
    """Redraws loss, margin and β, or what `draw` shows, below the running cell, at most every `seconds_between` s.

    As a callback of a trainer in this process it moves by itself; for one elsewhere, call `refresh` now and then, and
    `finish` in the end.

    Args:
        train_dir: where the run's record is written.
        draw: makes a figure of the steps so far and a title.
    """

    def __init__(
        self,
        train_dir: str | Path,
        seconds_between: float = 2.0,
        draw: Callable[[pd.DataFrame, str], Figure] = live,
    ):
        self.train_dir = Path(train_dir)
        self.draw = draw
        self.seconds_between = seconds_between
        self.drawn = -float("inf")
        self.handle: DisplayHandle | None = None
        self.micro_batches = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.micro_batches = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro_batches += 1
        # Until there is a step to draw, in words how the first one comes along.
        if state.global_step == 0 and time.monotonic() - self.drawn >= self.seconds_between:
            self._show(Pretty(micro_batch(state, self.micro_batches, args.gradient_accumulation_steps)))

    def on_step_end(self, args, state, control, **kwargs):
        self.refresh()

    def on_train_end(self, args, state, control, **kwargs):
        self.finish()

    def refresh(self) -> None:
        """Draw what is recorded by now, unless there is nothing yet or the last drawing is recent."""
        if time.monotonic() - self.drawn < self.seconds_between or not (self.train_dir / STEPS_FILE).exists():
            return
        try:
            steps = read_steps(self.train_dir)
        except DamagedRecord:
            return  # what an earlier run has left: the one that is about to begin looks at it, and says what it does
        if len(steps):
            before, last = read_done_before(self.train_dir), steps["step"].iloc[-1]
            new = steps.loc[steps["step"] > before, "seconds"]
            seconds = seconds_left(new, last - before, max(0, read_total_steps(self.train_dir) - last))
            self._draw(steps, "" if seconds is None else f", about {as_time(seconds)} left")

    def finish(self) -> None:
        """Draw the whole record of a run that has ended."""
        self._draw(read_steps(self.train_dir), ", done")

    def _draw(self, steps: pd.DataFrame, progress: str) -> None:
        title = f"Step {steps['step'].iloc[-1]} of {read_total_steps(self.train_dir)}{progress}"
        self._show(as_image(self.draw(steps, title)))

    def _show(self, what: Image | Pretty) -> None:
        if self.handle is None:
            self.handle = display(what, display_id=True)
        else:
            self.handle.update(what)
        self.drawn = time.monotonic()
