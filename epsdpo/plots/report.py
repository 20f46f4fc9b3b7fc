"""Figures that join several runs: what each gained, and how far it moved from the reference to gain it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, new_figure, run_styles


def win_rate_against_kl(table: pd.DataFrame, title: str) -> Figure:
    """Win rate over KL(π‖π_ref), one point per run with both 95 % intervals: high and to the left is better.

    Args:
        table: columns title, win_rate, win_rate_low, win_rate_high (percent), kl_per_response,
            kl_per_response_low, kl_per_response_high (nats).
        title: what to see.
    """
    figure, (axes,) = new_figure()
    styles = run_styles(table["title"])
    for index, row in enumerate(table.itertuples()):
        axes.errorbar(
            row.kl_per_response,
            row.win_rate,
            xerr=[
                [row.kl_per_response - row.kl_per_response_low],
                [row.kl_per_response_high - row.kl_per_response],
            ],
            yerr=[[row.win_rate - row.win_rate_low], [row.win_rate_high - row.win_rate]],
            fmt="os^Dv"[index % 5],
            color=styles[row.title]["color"],
            capsize=3,
            label=row.title,
        )
    axes.axhline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.annotate("no better than the reference", (0.01, 50.0), (0, 3), ("axes fraction", "data"), "offset points")
    axes.set_xlim(left=0.0)
    axes.set_xlabel("KL(π‖π_ref) per response (nats), 95 % interval")
    axes.set_ylabel("win rate (%), 95 % interval")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
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
                axes.text(middle, height, f"{share:.0%}", ha="center", va="center", color="white", fontsize="small")
        left += shares
    axes.set_yticks(heights, table["title"])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of all pairs seen in training (%)")
    axes.grid(visible=False)
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
