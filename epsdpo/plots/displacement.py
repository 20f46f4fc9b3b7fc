"""Figures of chosen and rejected responses apart: their log-ratios, and the share of displaced pairs."""

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from epsdpo.plots.looks import line_of, run_looks
from epsdpo.plots.style import CHOSEN, LOG_RATIO, NEUTRAL, NOTE, SIDES, legend_below, named, new_figure

_MOST_INTERVALS = 4  # runs whose intervals are drawn; those of more hide one another


def apart_over_training(table: pd.DataFrame, onset: tuple[int, int] | None, title: str) -> Figure:
    """Log-ratios of both responses of one run, and the share of displaced pairs, over training with 95 % intervals.

    Args:
        table: of `over_training`, or of `over_steps`, which has neither intervals nor a share.
        onset: between which steps displacement begins, shaded; None if it cannot be told.
        title: what to see.
    """
    figure, (log_ratios, share) = new_figure(width=10.5, columns=2)
    share.sharex(log_ratios)
    for side, line in SIDES.items():
        _draw(log_ratios, table[table["measure"] == side], {**line, "label": side}, intervals=True)
    displaced = table[table["measure"] == "displaced"]
    _draw(share, displaced, {"color": CHOSEN}, intervals=True)
    _finish(log_ratios, share)
    if onset is not None:
        for axes in (log_ratios, share):
            axes.axvspan(*onset, color=NEUTRAL, alpha=0.12, linewidth=0, label="displacement begins within", zorder=0)
    if displaced.empty:
        share.annotate("needs pairs, and there are means alone", (0.03, 0.03), **NOTE)
    figure.suptitle(title)
    legend_below(figure, *log_ratios.get_legend_handles_labels())
    return figure


def apart_by_group(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Log-ratios and displaced pairs of groups of pairs with 95 % intervals: a column of panels for each grouping.

    Args:
        tables: what is grouped by, with its unit -> the table of `by_decision` or `by_likeness`.
        title: what to see.
    """
    figure, panels = new_figure(width=10.5, height=5.6, rows=2, columns=len(tables))
    upper, lower = panels[: len(tables)], panels[len(tables) :]
    for axes in upper[1:]:
        axes.sharey(upper[0])
    for (label, table), log_ratios, share in zip(tables.items(), upper, lower, strict=True):
        groups = list(dict.fromkeys(table["group"]))
        for shift, (side, line) in zip((-0.12, 0.12), SIDES.items(), strict=True):
            _points(log_ratios, table[table["measure"] == side], groups, shift, line["color"], side)
        _points(share, table[table["measure"] == "displaced"], groups, 0.0, CHOSEN)
        _finish(log_ratios, share)
        for axes in (log_ratios, share):
            axes.set_xticks(range(len(groups)), groups)
            axes.set_xlim(-0.6, len(groups) - 0.4)
            axes.set_xlabel(label)
    figure.suptitle(title)
    legend_below(figure, *upper[0].get_legend_handles_labels())
    return figure


def apart_of_runs(tables: Mapping[str, pd.DataFrame], families: Mapping[str, str], title: str) -> Figure:
    """Log-ratios of chosen and of rejected responses and the share of displaced pairs, a line per run and panel.

    Intervals are drawn of a few runs; a panel names the runs of which it has nothing.

    Args:
        tables: title of a run -> its table of `over_training`, or `over_steps`.
        families: title of a run -> its family, from `family_of`.
        title: what to see.
    """
    figure, (chosen, rejected, share) = new_figure(width=10.5, height=3.6, columns=3)
    rejected.sharey(chosen)
    drawn = {}  # a run that lacks the share may have the rest
    for axes, measure in ((chosen, "chosen"), (rejected, "rejected"), (share, "displaced")):
        rows = {name: table[table["measure"] == measure] for name, table in tables.items()}
        for name, look in run_looks(families).items():
            if len(rows[name]):
                intervals = len(tables) <= _MOST_INTERVALS
                drawn[name] = _draw(axes, rows[name], {**line_of(look), "label": name}, intervals)
        if missing := [name for name in tables if rows[name].empty]:
            axes.annotate(f"not known for {named(missing)}", (0.03, 0.03), **NOTE)
    for axes, side in ((chosen, "chosen"), (rejected, "rejected")):
        _finish(axes, share)
        axes.set_title(side)
    share.set_title("displaced")
    figure.suptitle(title)
    if drawn:
        legend_below(figure, list(drawn.values()), list(drawn))
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, line: Mapping[str, object], intervals: bool) -> Line2D:
    """A line through the stretches of training, and around it their intervals where there are any."""
    (drawn,) = axes.plot(rows["step"], rows["value"], linewidth=1.8, **line)
    if intervals and rows["low"].notna().any():
        axes.fill_between(rows["step"], rows["low"], rows["high"], color=line["color"], alpha=0.18, linewidth=0)
    return drawn


def _points(
    axes: Axes, rows: pd.DataFrame, groups: list[str], shift: float, colour: str, label: str | None = None
) -> None:
    """A point with its interval for each group, beside its place."""
    places = [groups.index(group) + shift for group in rows["group"]]
    ends = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    axes.errorbar(places, rows["value"], yerr=ends, fmt="o", color=colour, capsize=3, markersize=5, label=label)


def _finish(log_ratios: Axes, share: Axes) -> None:
    for axes in (log_ratios, share):
        axes.set_xlabel("optimiser step")
    log_ratios.axhline(0.0, color=NEUTRAL, linewidth=0.8, linestyle=":")
    log_ratios.set_ylabel(LOG_RATIO)
    share.set_ylim(-0.03, 1.03)
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    share.set_ylabel("displaced pairs")
