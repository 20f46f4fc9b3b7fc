"""The chart that moves while a run trains in JupyterLab.

It reads the β record that the trainer writes anyway, so it can neither slow a step down much nor change a run.
"""

import time

from IPython.display import DisplayHandle, Image, display
from transformers import TrainerCallback

from epsdpo.plots.style import as_image
from epsdpo.plots.trajectory import live
from epsdpo.record import read_steps


class LiveChart(TrainerCallback):
    """Redraws loss, margin and β below the running cell, at most every `seconds_between` seconds."""

    def __init__(self, seconds_between: float = 2.0):
        self.seconds_between = seconds_between
        self.drawn = -float("inf")
        self.handle: DisplayHandle | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self.drawn >= self.seconds_between:
            self._draw(args.output_dir, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._draw(args.output_dir, state)

    def _draw(self, output_dir: str, state) -> None:
        picture = self._picture(output_dir, state)
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)
        self.drawn = time.monotonic()

    @staticmethod
    def _picture(output_dir: str, state) -> Image:
        steps = read_steps(output_dir)
        seconds = steps["seconds"].median() * (state.max_steps - state.global_step)
        left = f"about {seconds:.0f} s left" if state.global_step < state.max_steps else "done"
        return as_image(live(steps, f"Step {state.global_step} of {state.max_steps}, {left}"))
