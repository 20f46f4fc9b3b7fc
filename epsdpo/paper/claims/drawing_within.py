"""Figures of the claims page about what happens within training; each is drawn of the table that has its name."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from epsdpo.paper.claims.drawing import FORWARD_KL, WIN_RATE, log_axis, looks_of, nothing_to_show, style_of
from epsdpo.paper.drawing_bound import largest_tried, limit_points
from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, legend_below, new_figure

FEWEST_WORLDS = 3  # whose interval is drawn
_MARKERS = {"relaxed": "o", "tied": "s", "tightened": "^"}


def dynamics(table: pd.DataFrame) -> Figure:
    """Figure 3: win rate and forward KL at checkpoints, shares of β⁻ and β⁺, a line per group.

    Bars and bands are intervals over worlds.
    """
    if table.empty:
        return nothing_to_show()
    figure, panels = new_figure(width=10.5, height=6.2, rows=2, columns=2)
    labels = {
        "win_rate": WIN_RATE,
        "forward_kl_per_response": FORWARD_KL,
        "relaxed": "pairs that chose β⁻ (%)",
        "tightened": "pairs that chose β⁺ (%)",
    }
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        for group, look in looks_of(table).items():
            rows = table[(table["group"] == group) & (table["measure"] == measure)].sort_values("share_of_epoch")
            axes.plot(rows["share_of_epoch"], rows["mean"], **style_of(look), markersize=4, label=group)
            axes.fill_between(rows["share_of_epoch"], *_band(rows), color=look.colour, alpha=0.15, linewidth=0)
        axes.set_ylabel(label)
        _over_the_epoch(axes)
        if measure != "win_rate":  # an interval by Student's t may begin below 0, which shares and divergences cannot
            axes.set_ylim(bottom=0.0)
    figure.suptitle("Within training: what a larger ε changes")
    legend_below(figure, *panels[2].get_legend_handles_labels())
    return figure


def margins(table: pd.DataFrame) -> Figure:
    """Figure 4a: implicit reward margins by what the criterion decided, over β, a panel per group.

    A decision that was taken in fewer than three worlds has hollow points without a bar: the
    interval of two is so wide that it would set the scale, and nothing else could be read.
    """
    if table.empty:
        return nothing_to_show()
    groups = list(dict.fromkeys(table["group"]))
    figure, panels = new_figure(width=max(6.5, 4.5 * len(groups)), columns=len(groups))
    for axes, group in zip(panels, groups, strict=True):
        inside = table[table["group"] == group]
        for number, decision in enumerate(DECISION_COLOURS):
            rows = inside[inside["decision"] == decision].sort_values("beta")
            colour, few = DECISION_COLOURS[decision], rows["worlds"] < FEWEST_WORLDS
            places = rows["beta"] * 1.04 ** (number - 1)  # a little apart, that bars do not hide each other
            axes.errorbar(
                places,
                rows["mean"],
                yerr=(rows["high"] - rows["mean"]).mask(few),
                fmt=f"{_MARKERS[decision]}-",
                color=colour,
                capsize=3,
                label=DECISION_LABELS[decision],
            )
            axes.plot(
                places[few], rows["mean"][few], _MARKERS[decision], color=colour, markerfacecolor="white", zorder=3
            )
        log_axis(axes.xaxis)
        axes.set_xticks(sorted(inside["beta"].unique()))
        axes.minorticks_off()
        axes.axhline(0.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
        axes.set_xlabel("β (log scale)")
        axes.set_title(group, fontsize=10)
    panels[0].set_ylabel("implicit reward margin, β̃ (z − γ)")
    figure.suptitle("How sure the policy is of the pairs, by what the criterion decided of them")
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def bound(table: pd.DataFrame) -> Figure:
    """Figure 5: up to which ε decisions hold over training, a panel per group and precision.

    Hollow points are lower limits.
    """
    if table.empty:
        return nothing_to_show()
    places = list(dict.fromkeys(table[["group", "criterion_dtype"]].itertuples(index=False, name=None)))
    figure, panels = new_figure(width=max(6.5, 4.8 * len(places)), columns=len(places))
    for axes, (group, precision) in zip(panels, places, strict=True):
        inside = table[(table["group"] == group) & (table["criterion_dtype"] == precision)]
        for decision, colour in DECISION_COLOURS.items():
            rows = inside[inside["decision"] == decision].sort_values("share_of_epoch")
            if len(rows):
                look = f"{_MARKERS[decision]}-"
                axes.plot([], [], look, color=colour, markersize=4, label=DECISION_LABELS[decision])
                axes.plot(rows["share_of_epoch"], rows["mean"], color=colour)
                place = rows["share_of_epoch"], rows["mean"], rows["share_at_largest"]
                limit_points(axes, *place, colour, _MARKERS[decision])
                axes.fill_between(rows["share_of_epoch"], *_band(rows), color=colour, alpha=0.18, linewidth=0)
        axes.axhline(
            0.008, color=NEUTRAL, linestyle=":", linewidth=1.2, label="paper: 0.008 after a fifth of the epoch"
        )
        largest_tried(axes, inside["largest_epsilon"])
        axes.set_title(f"{group}, criterion in {precision}", fontsize=10)
        axes.sharey(panels[0])
        _over_the_epoch(axes)
    panels[0].set_ylabel("upper bound of ε, mean over pairs")
    figure.suptitle("Up to which ε the decisions of pairs hold")
    # A decision that no pair took has no line in its panel.
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    legend_below(figure, list(entries.values()), list(entries))
    return figure


def _band(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return rows["low"].to_numpy(float), rows["high"].to_numpy(float)


def _over_the_epoch(axes: Axes) -> None:
    axes.set_xlim(0.0, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of training")
