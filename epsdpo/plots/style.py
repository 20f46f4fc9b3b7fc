"""How every figure looks: colours, sizes, legends.

No number is made here. Figures are matplotlib objects without pyplot's global state, so they look the same in
JupyterLab, headless, and whatever backend a user has set. How the lines of several runs are told apart is
`epsdpo.plots.runs`' business, how a figure reaches the disk and the page that of `epsdpo.plots.saving`.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; each decision has one of its own.
DECISION_COLOURS = {"relaxed": "#0072B2", "tied": "#999999", "tightened": "#D55E00"}
DECISION_LABELS = {"relaxed": "relaxed (β⁻)", "tied": "tied (β)", "tightened": "tightened (β⁺)"}
CHOSEN, REJECTED = "#009E73", "#CC79A7"
ACCENT = "#0072B2"  # of a figure that shows one run or one thing
NEUTRAL = "#555555"

LEGEND_LETTERS = 9.0  # points, of a legend under a figure

_POINTS_PER_LETTER = 0.56  # width of a letter over the size of its font, on average and rounded up
_KEY_POINTS = 42.0  # the line before a name in a legend, and the space after it
_LINES_PER_ENTRY = 1.55  # height of an entry of a legend, in sizes of its font


def new_figure(width: float = 9.0, height: float = 4.0, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its panels, in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


class LegendLayout(NamedTuple):
    """How names are set under a figure: broken into lines where need be, in so many columns, so many inches high."""

    labels: list[str]
    columns: int
    height: float


def legend_layout(width: float, labels: Sequence[str], fontsize: float) -> LegendLayout:
    """The layout of a legend under a figure that is `width` inches wide."""
    points, letter = width * 72, _POINTS_PER_LETTER * fontsize
    labels = [textwrap.fill(label, int((points - _KEY_POINTS) / letter)) for label in labels]
    longest = max(len(part) for label in labels for part in label.split("\n"))
    columns = max(1, min(len(labels), int(points / (longest * letter + _KEY_POINTS))))
    lines = math.ceil(len(labels) / columns) * max(label.count("\n") + 1 for label in labels)
    return LegendLayout(labels, columns, (lines * _LINES_PER_ENTRY * fontsize + 6.0) / 72)


def legend_below(
    figure: Figure, handles: Sequence[Artist | Container], labels: Sequence[str], fontsize: float = LEGEND_LETTERS
) -> None:
    """One legend for the whole figure, under its panels; the figure grows by its height."""
    names, columns, height = legend_layout(figure.get_figwidth(), labels, fontsize)
    figure.set_figheight(figure.get_figheight() + height)
    figure.legend(
        handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=fontsize, columnspacing=1.4
    )
