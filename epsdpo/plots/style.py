"""How every figure looks: colours, sizes, legends.

Figures are matplotlib objects without pyplot's global state, so they look the same in JupyterLab, headless, and
whatever backend a user has set.
"""

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

# Every colour of every figure. A colour means one thing: a method, a decision, or how something came out. Colours of
# one table can be told apart by readers who do not see red and green as others do.
METHOD_COLOURS = {  # Okabe and Ito's but for yellow, too light for a line, with greys and an indigo
    "dpo": "#555555",
    "epsilon_dpo bfloat16": "#0072B2",
    "epsilon_dpo bfloat16_logits": "#1900B2",
    "epsilon_dpo float32": "#D55E00",
    "beta_dpo": "#009E73",
    "tr_dpo": "#56B4E9",
    "ipo": "#CC79A7",
    "simpo": "#E69F00",
    "starting model": "#999999",
    "other": "#000000",
}
DECISION_COLOURS = {"relaxed": "#6A4CC2", "tied": "#CFC07A", "tightened": "#7A1F2B"}
OUTCOME_COLOURS = {"good": "#3D6B00", "undecided": "#93A3BC", "bad": "#C2287F", "alike": "#0B2545"}
NEUTRAL = "#333333"  # what is none of them: letters, lines to compare with, counts

DECISION_LABELS = {"relaxed": "relaxed (β⁻)", "tied": "tied (β)", "tightened": "tightened (β⁺)"}
CHOSEN, REJECTED = OUTCOME_COLOURS["good"], OUTCOME_COLOURS["bad"]
# The lines of what both responses of a pair have.
SIDES = {"chosen": {"color": CHOSEN, "linestyle": "-"}, "rejected": {"color": REJECTED, "linestyle": "--"}}
LOG_RATIO = "log π − log π_ref (nats)"

# How a panel says in its corner what it lacks.
NOTE = {
    "xycoords": "axes fraction",
    "fontsize": "small",
    "bbox": {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1.0},
}
_LONGEST_LIST = 16  # letters of the names of runs in a panel; of more only the number is given

LEGEND_LETTERS = 9.0  # points, of a legend under a figure

_BETWEEN_COLUMNS = 1.4  # of a legend, in sizes of its letters


def new_figure(width: float = 9.0, height: float = 4.0, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `width` × `height` inches and its panels, in reading order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def named(names: Sequence[str]) -> str:
    """The runs that a panel lacks, as its note calls them."""
    listed = ", ".join(names)
    return listed if len(listed) <= _LONGEST_LIST else f"{len(names)} of the runs"


def legend_below(
    figure: Figure, handles: Sequence[Artist | Container], labels: Sequence[str], fontsize: float = LEGEND_LETTERS
) -> None:
    """One legend for the whole figure, under its panels, in as many columns as it has room for; the figure grows by it.

    A label that is longer than the figure is wide is broken into lines.
    """
    room = figure.get_figwidth() * figure.dpi
    style = {"loc": "outside lower center", "frameon": False, "fontsize": fontsize, "columnspacing": _BETWEEN_COLUMNS}
    legend = figure.legend(handles, labels, ncols=1, **style)
    column = legend.get_window_extent().width
    if column > room:
        for text in legend.get_texts():
            _break_lines(text, room - (column - max(each.get_window_extent().width for each in legend.get_texts())))
    elif len(labels) > 1:
        legend.remove()
        between = _BETWEEN_COLUMNS * fontsize / 72 * figure.dpi
        columns = min(len(labels), int((room + between) / (column + between)))
        legend = figure.legend(handles, labels, ncols=columns, **style)
    figure.set_figheight(figure.get_figheight() + legend_height(legend))


def legend_height(legend: Legend) -> float:
    """The height in inches that a legend takes under a figure, with the layout's padding."""
    figure = legend.get_figure()
    return legend.get_window_extent().height / figure.dpi + 2 * figure.get_layout_engine().get()["h_pad"]


def _break_lines(text: Text, room: float) -> None:
    """Break a text between its words so that no line is wider than `room`, in pixels."""
    lines, words = [], text.get_text().split()
    while words:
        count = len(words)
        while count > 1 and _width(text, " ".join(words[:count])) > room:
            count -= 1
        lines.append(" ".join(words[:count]))
        words = words[count:]
    text.set_text("\n".join(lines))


def _width(text: Text, words: str) -> float:
    text.set_text(words)
    return text.get_window_extent().width
