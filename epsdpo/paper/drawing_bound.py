"""The figure of the ε bound: up to which ε pairs stay monotone, over training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, new_figure

_LOWER_LIMIT = "lower limit: some pairs hold up to the largest ε tried"


def epsilon_bounds(bounds: pd.DataFrame, title: str) -> Figure:
    """Mean upper bound of ε against the optimiser step, from `mean_bounds`, with 95 % intervals.

    Hollow points are lower limits.
    """
    figure, (axes,) = new_figure()
    for decision, rows in bounds.groupby("decision", sort=False):
        colour = DECISION_COLOURS[decision]
        axes.plot(rows["step"], rows["bound"], "-", color=colour, label=DECISION_LABELS[decision])
        limit_points(axes, rows["step"], rows["bound"], rows["share_at_largest"], colour, "o")
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    largest_tried(axes, bounds["largest_epsilon"])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("upper bound of ε, 95 % interval")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def limit_points(
    axes: Axes, places: pd.Series, bounds: pd.Series, share_at_largest: pd.Series, colour: str, marker: str
) -> None:
    """A point at each mean bound, hollow where some of its pairs hold up to the largest ε tried: a lower limit."""
    limits = share_at_largest > 0.0
    axes.plot(places[~limits], bounds[~limits], marker, color=colour, markersize=4)
    axes.plot(places[limits], bounds[limits], marker, color=colour, markersize=4, markerfacecolor="white")


def largest_tried(axes: Axes, largest: pd.Series) -> None:
    """A line at the largest ε tried, above which no bound can be seen, and what hollow points are, for the legend."""
    if largest.isna().all():
        return
    axes.axhline(
        largest.max(), color=NEUTRAL, linestyle="-.", linewidth=1.0, label=f"largest ε tried: {largest.max():g}"
    )
    axes.plot([], [], "o", color=NEUTRAL, markersize=4, markerfacecolor="white", label=_LOWER_LIMIT)
