"""A figure made fit for print: the width of a column, small letters, no title.

How it is set changes, and not what it shows. Figures are drawn for the page; any of them can be set for print.
"""

from matplotlib.artist import Artist
from matplotlib.container import Container
from matplotlib.figure import Figure
from matplotlib.text import Text

from epsdpo.plots.style import legend_below, legend_height

SINGLE_COLUMN, DOUBLE_COLUMN = 3.25, 6.75  # inches, as in ICML's and ACL's two-column pages; NeurIPS' text is 5.5
_LETTERS, _SMALL_LETTERS = 8.0, 7.0  # points
_PANEL_SHAPE = 0.75  # height over width
_SHRINKAGE = 0.6  # of letters, from the page to the print
_LINES = 0.65  # how much thinner lines and markers are than on the page
_ROOM_FOR_NAMES = 0.3  # of a single column; longer names beside bars leave too little for the bars


def fit_for_print(figure: Figure) -> None:
    """Set a figure for print, in place: one panel in a single column, several side by side in a double one.

    The title goes, since the caption says it; titles of several panels stay, since they tell them apart. Legends move
    under the figure.
    """
    figure.suptitle("")
    if len(figure.axes) == 1:
        figure.axes[0].set_title("")
    height = figure.get_figheight() - sum(map(legend_height, figure.legends))
    entries = _take_legends(figure)
    for text in figure.findobj(Text):
        text.set_fontsize(_LETTERS if text.get_fontsize() >= 10.0 else _SMALL_LETTERS)
    for axes in figure.axes:
        axes.tick_params(labelsize=_SMALL_LETTERS, length=2.5, width=0.6)
        for line in axes.lines:
            line.set_linewidth(line.get_linewidth() * _LINES)
            line.set_markersize(line.get_markersize() * _LINES)
        for collection in axes.collections:  # intervals
            collection.set_linewidth(collection.get_linewidth() * _LINES)
        for spine in axes.spines.values():
            spine.set_linewidth(0.6)

    grids = [axes.get_subplotspec().get_gridspec() for axes in figure.axes]
    rows, columns = max(grid.nrows for grid in grids), max(grid.ncols for grid in grids)
    names = [label.get_window_extent().width for axes in figure.axes for label in axes.get_yticklabels()]
    wide = columns > 1 or max(names) > _ROOM_FOR_NAMES * SINGLE_COLUMN * figure.dpi
    width = DOUBLE_COLUMN if wide else SINGLE_COLUMN
    panels_height = rows * _PANEL_SHAPE * min(width / columns, SINGLE_COLUMN)
    # Many bars need the height that they had, less what the letters beside them have shrunk by.
    figure.set_size_inches(width, max(panels_height, height * _SHRINKAGE))
    if entries:
        legend_below(figure, list(entries.values()), list(entries), fontsize=_SMALL_LETTERS)


def _take_legends(figure: Figure) -> dict[str, Artist | Container]:
    """Remove every legend of the figure, and return what they named: label -> what was drawn under it."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    named = {_on_one_line(text.get_text()) for legend in legends for text in legend.get_texts()}
    for legend in legends:
        legend.remove()
    entries = {}
    for axes in figure.axes:
        entries |= {label: drawn for drawn, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    return {label: drawn for label, drawn in entries.items() if _on_one_line(label) in named}


def _on_one_line(label: str) -> str:
    """A label as it is compared: a legend may have broken it."""
    return " ".join(label.split())
