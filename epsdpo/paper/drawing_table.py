"""A table of the paper as a picture: each printed number over what was measured, a panel for each kind of number."""

import pandas as pd
from matplotlib.figure import Figure

from epsdpo.paper.published import Published
from epsdpo.paper.table_cells import MEASURED
from epsdpo.plots.style import NEUTRAL, OUTCOME_COLOURS, legend_below, new_figure

_LOOKS = {  # of what was measured, by whether the printed number lies in the interval of prediction
    True: (OUTCOME_COLOURS["good"], "o", "measured; printed number inside the interval of prediction"),
    False: (OUTCOME_COLOURS["bad"], "s", "measured; printed number outside the interval of prediction"),
    None: (OUTCOME_COLOURS["undecided"], "^", "measured once, without an interval"),
}


_PRINTED = "printed in the paper"
_LABELS = [_PRINTED, *(label for _, _, label in _LOOKS.values())]

CAPTION = (
    "Numbers that the paper prints (open diamonds) over what was measured here: 95 % intervals (thick) and 95 % "
    "intervals of prediction (thin), where one more run would lie, or for a single run one more evaluation. A diamond "
    "alone has not been measured."
)


def beside_the_paper(table: Published, cells: pd.DataFrame) -> Figure:
    """One row per row of the table, or per cell of a grid; what has not run has the printed number alone.

    Args:
        cells: of `beside`, with something measured.
    """
    shown = [metric for metric, part in cells.groupby("metric", sort=False) if (part["state"] == MEASURED).any()]
    places = list(dict.fromkeys(zip(cells["row"], cells["column"], strict=True)))
    figure, panels = new_figure(width=10.5, height=1.4 + 0.34 * len(places), columns=len(shown))
    handles = {}
    for axes, metric in zip(panels, shown, strict=True):
        part = cells[cells["metric"] == metric]
        for cell in part.to_dict("records"):
            height = -places.index((cell["row"], cell["column"]))
            if cell["state"] == MEASURED:
                colour, marker, label = _LOOKS[cell["inside"]]
                if cell["inside"] is not None:
                    ends = [cell["prediction_low"], cell["prediction_high"]]
                    axes.plot(ends, [height] * 2, color=colour, linewidth=1.0, marker="|", markersize=7)
                    axes.plot([cell["low"], cell["high"]], [height] * 2, color=colour, linewidth=4.0, alpha=0.5)
                (handles[label],) = axes.plot(
                    cell["measured"], height, color=colour, marker=marker, markersize=6, linestyle="none"
                )
            (handles[_PRINTED],) = axes.plot(
                cell["published"], height, color=NEUTRAL, marker="D", markersize=6, fillstyle="none", linestyle="none"
            )
        axes.set_xlabel(part["prints"].iloc[0])
        axes.set_ylim(-len(places) + 0.4, 0.6)
        axes.set_yticks([])
    panels[0].set_yticks([-number for number in range(len(places))], [" / ".join(filter(None, at)) for at in places])
    panels[0].set_ylabel(" / ".join(filter(None, (table.rows, table.columns))))
    figure.suptitle(f"{table.title}: printed, and measured{' at another scale' if table.scale else ''}")
    shown_labels = [label for label in _LABELS if label in handles]
    legend_below(figure, [handles[label] for label in shown_labels], shown_labels)
    return figure
