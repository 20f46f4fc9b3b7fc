"""Figures of the precision study: the rounding model, what was decided, how β moved, and Table 5."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from epsdpo.methods.launches import IN_WORDS
from epsdpo.plots.looks import FAMILIES, Look, line_of
from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, legend_below, new_figure

# ε-DPO with its criterion in each precision looks as in every figure.
_EXACT, _ROUNDED = FAMILIES["epsilon_dpo float32"], FAMILIES["epsilon_dpo bfloat16"]
_CASES = (("-", "o"), ("--", "s"), ("-.", "^"))  # of one colour, since they are neither methods nor decisions
_COLUMNS = 3  # of panels with a setting each
_MEASURES = {
    "mean_step": "mean step",
    "beta_final": "β at the end",
    "forward_kl_per_response": "KL(π_ref‖π) per response (nats)",
    "win_rate": "win rate (points)",
}


def chance_curves(curves: pd.DataFrame, title: str) -> Figure:
    """The chance of a step against the shift of a sum in grid steps.

    Args:
        curves: columns case, shift, chance and simulated, of `simulated_cases`.
        title: what to see.
    """
    figure, (axes,) = new_figure(width=9.0, height=3.8)
    for (line, marker), (case, rows) in zip(_CASES, curves.groupby("case", sort=False), strict=False):
        axes.plot(rows["shift"], rows["chance"], color=NEUTRAL, linestyle=line, linewidth=1.6)
        axes.plot(rows["shift"], rows["simulated"], marker, color=NEUTRAL, markersize=4, markerfacecolor="white")
        axes.plot([], [], color=NEUTRAL, linestyle=line, marker=marker, markerfacecolor="white", label=case)
    axes.axvline(0.5, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.set_xlabel("shift of the larger-moving sum, ε|g| / q (grid steps)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("chance of a step")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def shares_over_epsilon(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Measured shares over ε with 95 % intervals, the model's as lines, and the exact ones dotted.

    A row of panels for each arithmetic that the criterion can be computed in and that rounds, a column for each table.

    Args:
        tables: what was measured -> its shares, of `shares` by epsilon.
        title: what to see.
    """
    rounded = [name for name in IN_WORDS if any(name in set(table["arithmetic"]) for table in tables.values())]
    rounded.remove("float32")
    figure, panels = new_figure(
        width=5.2 * len(tables), height=1.2 + 2.9 * len(rounded), rows=len(rounded), columns=len(tables)
    )
    places = [(arithmetic, name) for arithmetic in rounded for name in tables]
    for axes, (arithmetic, name) in zip(panels, places, strict=True):
        table = tables[name]
        _draw_measured(axes, table[table["arithmetic"] == arithmetic], "epsilon")
        for decision, rows in table[table["arithmetic"] == "float32"].groupby("decision", sort=False):
            axes.plot(rows["epsilon"], rows["share"], ":", color=DECISION_COLOURS[decision], linewidth=1.4)
        axes.set_xscale("log")
        epsilons = table["epsilon"].unique()
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.minorticks_off()
        axes.set_xlabel("ε of the criterion")
        axes.set_title(f"{IN_WORDS[arithmetic]}: {name}", fontsize="medium")
    figure.suptitle(title)
    _legend_below(figure, exact=True)
    return figure


def shares_over_quantities(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Measured shares in bfloat16 and the model's against quantities of a pair, one panel each.

    Args:
        tables: label of a quantity, with its unit -> its shares, of `shares` by bin.
        title: what to see.
    """
    figure, panels = new_figure(width=3.7 * len(tables), height=4.0, columns=len(tables))
    for axes, (label, table) in zip(panels, tables.items(), strict=True):
        _draw_measured(axes, table[table["arithmetic"] == "bfloat16"], "bin")
        axes.set_xlabel(label)
    figure.suptitle(title)
    _legend_below(figure, exact=False)
    return figure


def beta_by_precision(steps: pd.DataFrame, title: str) -> Figure:
    """β over optimiser steps, one panel per setting: thin lines are runs, thick ones their mean, by arithmetic.

    Args:
        steps: of `steps_of_twins`.
        title: what to see.
    """
    settings = list(dict.fromkeys(steps["setting"]))
    columns = min(len(settings), _COLUMNS)
    lines = -(-len(settings) // columns)
    figure, panels = new_figure(width=max(5.5, 3.6 * columns), height=0.6 + 3.0 * lines, rows=lines, columns=columns)
    for axes in panels[len(settings) :]:
        axes.remove()
    looks = _looks(steps)
    handles = {}
    for axes, setting in zip(panels, settings, strict=False):
        for precision, look in looks.items():
            rows, style = steps[(steps["setting"] == setting) & (steps["precision"] == precision)], line_of(look)
            for _, of_run in rows.groupby("run"):
                axes.plot(of_run["step"], of_run["beta_before"], alpha=0.3, linewidth=0.8, **style)
            mean = rows.groupby("step")["beta_before"].mean()
            (handles[IN_WORDS[precision]],) = axes.plot(mean.index, mean, linewidth=2.0, **style)
        axes.set_title(setting, fontsize="medium")
        axes.set_xlabel("optimiser step")
        axes.set_ylim(bottom=0.0)
    for axes in panels[: len(settings) : columns]:
        axes.set_ylabel("β (KL penalty)")
    figure.suptitle(title)
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def by_precision(table: pd.DataFrame, title: str) -> Figure:
    """What each arithmetic changes in mean step, final β, KL and win rate, with 95 % t-intervals over twins.

    Args:
        table: of `differences`.
        title: what to see.
    """
    settings = list(dict.fromkeys(table["setting"]))[::-1]
    looks = _looks(table)
    figure, panels = new_figure(width=12.0, height=1.2 + 0.5 * len(settings), columns=len(_MEASURES))
    handles = {}
    for axes, (measure, label) in zip(panels, _MEASURES.items(), strict=True):
        for place, (precision, look) in enumerate(looks.items()):
            rows = table[(table["measure"] == measure) & (table["precision"] == precision)]
            errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["change"].to_numpy())
            below = 0.3 * (place - (len(looks) - 1) / 2)  # arithmetics of a setting lie under each other
            heights = [settings.index(setting) - below for setting in rows["setting"]]
            handles[IN_WORDS[precision]] = axes.errorbar(
                rows["change"], heights, xerr=errors, fmt=look.marker, color=look.colour, capsize=3
            )
        axes.axvline(0.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
        axes.set_yticks(range(len(settings)), settings if axes is panels[0] else [""] * len(settings), fontsize="small")
        axes.set_ylim(-0.6, len(settings) - 0.4)
        axes.set_title(label, fontsize="medium")
        axes.set_xlabel("less that of the exact criterion")
    figure.suptitle(title)
    legend_below(figure, list(handles.values()), list(handles))
    return figure


def _looks(table: pd.DataFrame) -> dict[str, Look]:
    """How each arithmetic of a table is drawn, as in every figure; in the order of `IN_WORDS`."""
    present = set(table["precision"])
    return {precision: FAMILIES[f"epsilon_dpo {precision}"] for precision in IN_WORDS if precision in present}


def table_5(fits: pd.DataFrame, shares: pd.DataFrame, title: str) -> Figure:
    """The paper's average steps beside both explanations, and the shares that the rounded sums would come with.

    Args:
        fits: of `fits`.
        shares: columns epsilon, relaxed, tied, tightened of the fitted population, on a finer grid.
        title: what to see.
    """
    figure, panels = new_figure(width=10.5, height=4.2, columns=2)
    axes = panels[0]
    axes.plot(
        shares["epsilon"],
        shares["relaxed"] - shares["tightened"],
        **line_of(_ROUNDED),
        label="rounded sums, 2 fitted",
    )
    axes.axhline(fits["exact"].iloc[0], **line_of(_EXACT), label="exact arithmetic, 1 fitted")
    axes.plot(fits["epsilon"], fits["reported"], "o", color=NEUTRAL, label="Table 5, mean over ε_s")
    axes.set_ylabel("average step, share of β⁻ less share of β⁺")
    axes.legend(frameon=False, fontsize="small")
    for decision, colour in DECISION_COLOURS.items():
        panels[1].plot(shares["epsilon"], shares[decision], color=colour, label=DECISION_LABELS[decision])
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[1].set_ylabel("share of pairs by the fit")
    panels[1].legend(frameon=False, fontsize="small")
    for axes in panels:
        axes.set_xlabel("ε_c of the criterion")
        axes.set_xlim(0.0, shares["epsilon"].max())
        axes.set_ylim(bottom=0.0)
    figure.suptitle(title)
    return figure


def _draw_measured(axes: Axes, table: pd.DataFrame, position: str) -> None:
    """Shares in one arithmetic: points with their intervals, and the model's as lines."""
    for decision, rows in table.groupby("decision", sort=False):
        colour = DECISION_COLOURS[decision]
        errors = np.clip([rows["share"] - rows["low"], rows["high"] - rows["share"]], 0.0, None)
        axes.errorbar(rows[position], rows["share"], yerr=errors, fmt="o", color=colour, markersize=4, capsize=2)
        axes.plot(rows[position], rows["predicted"], color=colour, linewidth=1.6)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of pairs")


def _legend_below(figure: Figure, exact: bool) -> None:
    """What colours and lines mean, once for all panels."""
    axes = figure.axes[0]
    handles = [
        axes.plot([], [], "o", color=colour, label=DECISION_LABELS[decision])[0]
        for decision, colour in DECISION_COLOURS.items()
    ]
    lines = {"-": "model of rounding"} | ({":": "measured, float32"} if exact else {})
    handles += [axes.plot([], [], line, color=NEUTRAL, label=label)[0] for line, label in lines.items()]
    handles[0].set_label(f"{handles[0].get_label()}, measured")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
