"""Figures of an evaluation. What is a policy's own is drawn in `colour`, that of its run in every figure."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from epsdpo.plots.looks import FAMILIES, STARTING_MODEL
from epsdpo.plots.style import NEUTRAL, OUTCOME_COLOURS, new_figure


def win_rates(table: pd.DataFrame, title: str, colour: str = NEUTRAL) -> Figure:
    """Win rates as points with their intervals, one line each from top to bottom, and the 50 % line.

    Args:
        table: columns label, win_rate, low, high (percent).
        title: what to see.
    """
    figure, (axes,) = new_figure(height=1.6 + 0.45 * len(table))
    heights = np.arange(len(table))[::-1]
    # A length-controlled rate may lie outside its percentile bootstrap.
    errors = np.vstack([table["win_rate"] - table["low"], table["high"] - table["win_rate"]]).clip(min=0.0)
    ends = table[["low", "high"]].apply(lambda bound: bound.fillna(table["win_rate"]))  # one prompt has no interval
    axes.axvline(50.0, color=NEUTRAL, linestyle="--", linewidth=1.0)
    axes.errorbar(table["win_rate"], heights, xerr=errors, fmt="o", color=colour, capsize=4, linewidth=2.0)
    for height, rate, high in zip(heights, table["win_rate"], ends["high"], strict=True):
        axes.annotate(f"{rate:.1f}", (high, height), xytext=(8, 0), textcoords="offset points", va="center")
    # The 50 % line and the numbers beside the intervals are always in the picture.
    low, high = min(50.0, *ends["low"]), max(50.0, *ends["high"])
    margin = 0.1 * max(high - low, 10.0)
    axes.set_xlim(low - margin, high + 1.5 * margin)
    axes.set_ylim(-0.6, len(table) - 0.4)
    axes.set_yticks(heights, table["label"])
    axes.set_xlabel("win rate of the policy (%), with 95 % bootstrap interval over prompts")
    axes.set_title(title)
    return figure


def response_lengths(responses: pd.DataFrame, colour: str = NEUTRAL) -> Figure:
    """How long the responses of policy and reference are, in tokens; the dotted lines are the means."""
    figure, (axes,) = new_figure()
    longest = int(responses[["policy_tokens", "reference_tokens"]].to_numpy().max())
    width = max(1, -(-longest // 40))
    edges = np.arange(0, longest + width, width) + 0.5
    start = FAMILIES[STARTING_MODEL].colour
    styles = {"reference": (start, {"alpha": 0.5}), "policy": (colour, {"histtype": "step", "linewidth": 2.0})}
    for side, (shade, style) in styles.items():
        tokens = responses[f"{side}_tokens"]
        share = np.full(len(tokens), 1.0 / len(tokens))
        axes.hist(tokens, edges, weights=share, color=shade, label=f"{side}, mean {tokens.mean():.1f}", **style)
        axes.axvline(tokens.mean(), color=shade, linestyle=":", linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("tokens per response, end token included")
    axes.set_ylabel("share of prompts")
    axes.set_title("Response lengths on the held-out prompts")
    axes.legend(frameon=False)
    return figure


def win_rate_by_length(table: pd.DataFrame, title: str, colour: str = NEUTRAL) -> Figure:
    """Win rate over how much longer the policy's response is, a point per group of prompts with its interval.

    Args:
        table: columns difference (characters), win_rate, low, high (percent).
        title: what to see.
    """
    figure, (axes,) = new_figure()
    errors = np.vstack([table["win_rate"] - table["low"], table["high"] - table["win_rate"]])
    axes.axhline(50.0, color=NEUTRAL, linestyle="--", linewidth=1.0)
    axes.axvline(0.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.errorbar(table["difference"], table["win_rate"], yerr=errors, fmt="o-", color=colour, capsize=4)
    axes.set_xlabel("characters of the policy's response − characters of the other, mean of a group of prompts")
    axes.set_ylabel("win rate (%), 95 % interval")
    axes.set_title(title)
    return figure


def within_training(table: pd.DataFrame, title: str, colour: str = NEUTRAL) -> Figure:
    """Forward KL, and where there was a judge the win rate, over the steps of training, a point per checkpoint.

    Args:
        table: columns step, forward_kl_per_response (nats) and, where judged, win_rate (percent), the last two with
            their `_low` and `_high`.
        title: what to see.
    """
    labels = {"forward_kl_per_response": "KL(π_ref‖π) per response (nats)", "win_rate": "win rate (%)"}
    labels = {measure: label for measure, label in labels.items() if measure in table}
    figure, panels = new_figure(columns=len(labels))
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        errors = np.vstack([table[measure] - table[f"{measure}_low"], table[f"{measure}_high"] - table[measure]])
        axes.errorbar(table["step"], table[measure], yerr=errors, fmt="o-", color=colour, capsize=4)
        axes.set_xlim(left=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"{label}, 95 % interval")
        if measure == "win_rate":
            axes.axhline(50.0, color=NEUTRAL, linestyle="--", linewidth=1.0)
    figure.suptitle(title)
    return figure


def preference_histogram(responses: pd.DataFrame, colour: str = NEUTRAL) -> Figure:
    """How sure the judge is: its chances that the policy's response is the better one, over all judged prompts."""
    chances = 100.0 * (responses["preference"].dropna() - 1.0)
    figure, (axes,) = new_figure()
    axes.hist(chances, np.linspace(0.0, 100.0, 21), color=colour)
    axes.axvline(50.0, color=NEUTRAL, linestyle="--", linewidth=1.0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("judge's chance that the policy's response is better (%)")
    axes.set_ylabel("prompts")
    axes.set_title(f"How sure the judge is, over {len(chances)} prompts")
    return figure


def two_judges(calibration: pd.DataFrame, title: str) -> Figure:
    """This judge's preference over the published judge's, a point per comparison; on the diagonal they agree.

    Args:
        calibration: columns official, judged.
        title: what to see.
    """
    figure, (axes,) = new_figure(width=5.5, height=5.0)
    chances = 100.0 * (calibration[["official", "judged"]].dropna() - 1.0)
    axes.plot([0.0, 100.0], [0.0, 100.0], color=NEUTRAL, linestyle="--", linewidth=1.0)
    axes.axhline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.axvline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.scatter(chances["official"], chances["judged"], s=16, alpha=0.5, color=NEUTRAL)
    axes.set_aspect("equal")
    axes.set_xlabel("published judge: chance that the model wins (%)")
    axes.set_ylabel("this judge: chance that the model wins (%)")
    axes.set_xlim(-5.0, 105.0)
    axes.set_ylim(-5.0, 105.0)
    axes.set_title(title)
    return figure


def gold_differences(responses: pd.DataFrame) -> Figure:
    """Prompt by prompt, by how much the gold reward of the policy's response exceeds the reference's."""
    difference = (responses["policy_gold"] - responses["reference_gold"]).round(6)
    figure, (axes,) = new_figure()
    # A bin around 0 that holds the ties, and as many bins on either side.
    reach = max(0.1, float(difference.abs().max()))
    edges = np.linspace(-reach, reach, 26)
    good, undecided, bad = (OUTCOME_COLOURS[name] for name in ("good", "undecided", "bad"))
    groups = {"better": (difference > 0, good), "equal": (difference == 0, undecided), "worse": (difference < 0, bad)}
    axes.hist(
        [difference[rows] for rows, _ in groups.values()],
        edges,
        stacked=True,
        color=[colour for _, colour in groups.values()],
        label=[f"{name}: {rows.sum()} of {len(difference)}" for name, (rows, _) in groups.items()],
    )
    axes.axvline(0.0, color=NEUTRAL, linestyle="--", linewidth=1.0)
    axes.set_xlabel("gold reward of the policy's response − gold reward of the reference's")
    axes.set_ylabel("prompts")
    axes.set_title("On which side the gold judge comes down, and how clearly")
    axes.legend(frameon=False, title="policy's response is")
    return figure
