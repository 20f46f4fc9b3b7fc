"""Figures that join several runs: what each gained, and how far it moved from the reference to gain it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from epsdpo.plots.looks import run_looks
from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, legend_below, new_figure


def win_rate_against_kl(table: pd.DataFrame, families: Mapping[str, str], title: str) -> Figure:
    """Win rate over both divergences, one point per run with its 95 % intervals: high and to the left is better.

    Args:
        table: columns title, win_rate (percent), reverse_kl_per_response and forward_kl_per_response (nats), the last
            three with their `_low` and `_high`.
        families: title of a run -> its family, from `family_of`.
        title: what to see.
    """
    figure, panels = new_figure(columns=2)
    looks = run_looks({name: families[name] for name in table["title"]})
    labels = {"reverse": "KL(π‖π_ref)", "forward": "KL(π_ref‖π)"}
    for axes, (direction, label) in zip(panels, labels.items(), strict=True):
        measure = f"{direction}_kl_per_response"
        for row in table.to_dict("records"):
            look = looks[row["title"]]
            axes.errorbar(
                row[measure],
                row["win_rate"],
                xerr=[[row[measure] - row[f"{measure}_low"]], [row[f"{measure}_high"] - row[measure]]],
                yerr=[[row["win_rate"] - row["win_rate_low"]], [row["win_rate_high"] - row["win_rate"]]],
                fmt=look.marker,
                color=look.colour,
                capsize=3,
                label=row["title"],
                clip_on=False,
            )
        axes.axhline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
        axes.set_xlim(left=0.0)
        axes.set_xlabel(f"{label} per response (nats)")
    panels[0].set_ylabel("win rate (%)")
    panels[1].sharey(panels[0])
    figure.suptitle(title)
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def decisions_of_runs(table: pd.DataFrame, title: str) -> Figure:
    """Over a whole run, which share of its pairs chose each β̃: one bar per run.

    Args:
        table: columns title, relaxed, tied, tightened (shares that add up to 1).
        title: what to see.
    """
    figure, (axes,) = new_figure(height=1.4 + 0.45 * len(table))
    heights = np.arange(len(table))[::-1]
    left = np.zeros(len(table))
    for decision, colour in DECISION_COLOURS.items():
        shares = table[decision].to_numpy()
        axes.barh(heights, shares * 100, left=left * 100, color=colour, label=DECISION_LABELS[decision], height=0.6)
        for height, share, start in zip(heights, shares, left, strict=True):
            if share >= 0.06:
                middle = (start + share / 2) * 100
                letters = NEUTRAL if decision == "tied" else "white"  # legible on its colour
                axes.text(middle, height, f"{share:.0%}", ha="center", va="center", color=letters, fontsize="small")
        left += shares
    axes.set_yticks(heights, table["title"])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of all pairs seen in training (%)")
    axes.grid(visible=False)
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
