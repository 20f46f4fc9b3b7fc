"""The figure of the ε bound: up to which ε pairs stay monotone, over training."""

import pandas as pd
from matplotlib.figure import Figure

from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, new_figure


def epsilon_bounds(bounds: pd.DataFrame, title: str) -> Figure:
    """Mean upper bound of ε against the optimiser step, from `epsilon_bound.mean_bounds`, with 95 % intervals."""
    figure, (axes,) = new_figure()
    for decision, rows in bounds.groupby("decision", sort=False):
        colour = DECISION_COLOURS[decision]
        axes.plot(rows["step"], rows["bound"], "o-", color=colour, label=DECISION_LABELS[decision], markersize=4)
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("upper bound of ε, 95 % interval")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
