"""The figure of all verdicts: each claim's effect with its interval, against the range that is claimed."""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from epsdpo.paper.claims.verdicts import CANNOT_BE_TOLD, DOES_NOT_HOLD, HOLDS, NO_DIFFERENCE
from epsdpo.plots.style import NEUTRAL, OUTCOME_COLOURS

# Told apart by shape as well as by colour.
_LOOKS = {
    HOLDS: ("o", OUTCOME_COLOURS["good"]),
    DOES_NOT_HOLD: ("X", OUTCOME_COLOURS["bad"]),
    NO_DIFFERENCE: ("s", OUTCOME_COLOURS["alike"]),
    CANNOT_BE_TOLD: ("D", OUTCOME_COLOURS["undecided"]),
}
_MARGIN = {"linestyle": "none", "marker": "|", "color": NEUTRAL, "markersize": 9.0, "markeredgewidth": 0.9}
_LINE_INCHES, _LETTERS = 0.155, 70  # of a claim beside its row: height of a line, and the letters that fit into one


def all_verdicts(table: pd.DataFrame, title: str) -> Figure:
    """Effects with their intervals, a row per claim in its words and a panel per unit; the claimed range is shaded.

    Args:
        table: of `as_table`; claims without an effect keep an empty row. Effects that are lower limits are hollow.
        title: what to see.
    """
    table = table.assign(words=[textwrap.fill(says, _LETTERS) for says in table["says"]])
    units = table.groupby("unit", sort=False)
    # As high as the longest claim, and a line between; a panel's axis takes about as much room as five lines.
    lines = 1 + table["words"].str.count("\n").max() + 0.7
    rows = units.size().to_list()
    height = 1.2 + _LINE_INCHES * (lines * sum(rows) + 5.0 * len(rows))
    figure = Figure(figsize=(10.5, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, height_ratios=[count + 0.5 for count in rows], squeeze=False).ravel()
    for axes, (unit, claims) in zip(panels, units, strict=True):
        _panel(axes, claims.reset_index(drop=True))
        axes.set_xlabel(unit)
    handles = [
        panels[0].plot([], [], linestyle="none", marker=marker, color=colour, label=verdict)[0]
        for verdict, (marker, colour) in _LOOKS.items()
    ]
    handles.append(panels[0].fill_between([], [], [], color=NEUTRAL, alpha=0.12, linewidth=0, label="claimed range"))
    if table["margin"].notna().any():
        handles += panels[0].plot([], [], label="no practical difference between", **_MARGIN)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def _panel(axes: Axes, claims: pd.DataFrame) -> None:
    heights = np.arange(len(claims))[::-1]
    claims = claims.assign(least=-claims["margin"].astype(float))
    ends = claims[["effect", "low", "high", "above", "below", "margin", "least"]].to_numpy(dtype=float)
    least, most = np.nanmin(ends, initial=0.0), np.nanmax(ends, initial=0.0)
    margin = 0.08 * (most - least) or 1.0
    left, right = least - margin, most + margin
    for height, claim in zip(heights, claims.to_dict("records"), strict=True):
        above = left if pd.isna(claim["above"]) else claim["above"]
        below = right if pd.isna(claim["below"]) else claim["below"]
        axes.fill_between([above, below], height - 0.42, height + 0.42, color=NEUTRAL, alpha=0.12, linewidth=0)
        if not pd.isna(claim["margin"]):
            axes.plot([-claim["margin"], claim["margin"]], [height, height], **_MARGIN)
        if pd.isna(claim["effect"]):
            beside = {"xycoords": axes.get_yaxis_transform(), "va": "center"}
            axes.annotate(claim["why"], (0.01, height), **beside, fontsize="small", color=NEUTRAL)
            continue
        marker, colour = _LOOKS[claim["verdict"]]
        axes.plot([claim["low"], claim["high"]], [height, height], color=colour, linewidth=1.8)
        face = "white" if claim.get("lower_limit") else colour
        axes.plot(
            claim["effect"], height, marker=marker, color=colour, markerfacecolor=face, markersize=6.5, linestyle="none"
        )
    axes.axvline(0.0, color=NEUTRAL, linewidth=0.8, linestyle=":")
    axes.set_xlim(left, right)
    axes.set_ylim(-0.7, len(claims) - 0.3)
    axes.set_yticks(heights, claims["words"], fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
