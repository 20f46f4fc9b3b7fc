"""How every figure looks: colours, sizes, legends.

No number is made here. Figures are matplotlib objects without pyplot's global state, so they look the same in
JupyterLab, headless, and whatever backend a user has set. How the lines of several runs are told apart is
`epsdpo.plots.looks`' business, how a figure reaches the disk and the page that of `epsdpo.plots.saving`.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure

# Every colour of every figure. A colour means one thing: a method, a decision, or how something came out. Colours of
# one table can be told apart by readers who do not see red and green as others do.
METHOD_COLOURS = {  # Okabe and Ito's but for yellow, too light for a line, with greys; see `epsdpo.plots.looks`
    "dpo": "#555555",
    "epsilon_dpo bfloat16": "#0072B2",
    "epsilon_dpo float32": "#D55E00",
    "beta_dpo": "#009E73",
    "tr_dpo": "#56B4E9",
    "ipo": "#CC79A7",
    "simpo": "#E69F00",
    "starting model": "#999999",
    "other": "#000000",
}
DECISION_COLOURS = {"relaxed": "#6A4CC2", "tied": "#CFC07A", "tightened": "#7A1F2B"}
OUTCOME_COLOURS = {"good": "#3D6B00", "undecided": "#93A3BC", "bad": "#C2287F"}
NEUTRAL = "#333333"  # what is none of them: letters, lines to compare with, counts

DECISION_LABELS = {"relaxed": "relaxed (β⁻)", "tied": "tied (β)", "tightened": "tightened (β⁺)"}
CHOSEN, REJECTED = OUTCOME_COLOURS["good"], OUTCOME_COLOURS["bad"]

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
