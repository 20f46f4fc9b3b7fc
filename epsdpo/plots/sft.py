"""The figure of supervised fine-tuning, while it runs and after."""

import pandas as pd
from matplotlib.figure import Figure

from epsdpo.plots.looks import FAMILIES, STARTING_MODEL
from epsdpo.plots.style import new_figure


def loss_curve(steps: pd.DataFrame, title: str) -> Figure:
    """Cross-entropy per token of the chosen responses over steps, from `read_steps`, as the starting model is made."""
    figure, (axes,) = new_figure(height=3.0)
    axes.plot(steps["step"], steps["loss"], linewidth=1.8, color=FAMILIES[STARTING_MODEL].colour)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    return figure
