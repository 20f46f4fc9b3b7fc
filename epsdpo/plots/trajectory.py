"""Figures of the β record: β over steps, the decisions over training, and which pairs they fell on."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from epsdpo.plots.style import DECISION_COLOURS, DECISION_LABELS, NEUTRAL, new_figure, run_styles


def beta_trajectory(runs: dict[str, pd.DataFrame], title: str) -> Figure:
    """β before each optimiser step, one line per run.

    Args:
        runs: title of a run -> its steps, from `read_steps`.
        title: what to see.
    """
    figure, (axes,) = new_figure()
    for name, style in run_styles(runs).items():
        axes.plot(runs[name]["step"], runs[name]["beta_before"], label=name, linewidth=1.8, **style)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("β (KL penalty)")
    axes.set_ylim(bottom=0.0)
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure


def training_curves(runs: dict[str, pd.DataFrame]) -> Figure:
    """Loss, log-ratio margin and accuracy over steps; thin lines are steps, thick ones a running mean over a tenth.

    A panel says which runs do not have its quantity, such as the margin of a method without a reference.
    """
    figure, panels = new_figure(height=3.4, width=10.5, columns=3)
    quantities = {
        "loss": "loss (nats)",
        "log_ratio_margin": "log-ratio margin z − γ (nats)",
        "reward_accuracy": "pairs with margin > 0",
    }
    for axes, (column, label) in zip(panels, quantities.items(), strict=True):
        missing = [name for name, steps in runs.items() if steps[column].isna().all()]
        if missing:
            axes.annotate(
                f"not defined for {', '.join(missing)}", (0.03, 0.03), xycoords="axes fraction", fontsize="small"
            )
        for name, style in run_styles(runs).items():
            if name in missing:
                continue
            steps = runs[name]
            axes.plot(steps["step"], steps[column], color=style["color"], alpha=0.25, linewidth=0.8)
            smooth = steps[column].rolling(max(1, len(steps) // 10), center=True, min_periods=1).mean()
            axes.plot(steps["step"], smooth, label=name, linewidth=1.8, **style)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    panels[2].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle("Training: the loss depends on β, the log-ratio margin does not")
    return figure


def decision_fractions(fractions: pd.DataFrame, title: str) -> Figure:
    """Shares of the decisions over training, from `trajectory.decision_fractions`, with 95 % intervals."""
    figure, (axes,) = new_figure()
    _draw_shares(axes, fractions, "step")
    axes.set_xlabel("optimiser step")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def decisions_by(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """Shares of the decisions against quantities of the pair, one panel each, with 95 % intervals.

    Args:
        tables: label of a quantity, with its unit -> its table from `trajectory.decisions_by`.
        title: what to see.
    """
    figure, panels = new_figure(width=10.5, height=3.6, columns=len(tables))
    for axes, (label, table) in zip(panels, tables.items(), strict=True):
        _draw_shares(axes, table, "centre")
        axes.set_xlabel(label)
        if table["left"].min() < 0 < table["right"].max():
            axes.axvline(0.0, color=NEUTRAL, linewidth=0.8, linestyle=":")
    panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title)
    return figure


def live(steps: pd.DataFrame, title: str) -> Figure:
    """Loss, implicit reward margin and β of a run that is still training."""
    figure, panels = new_figure(width=10.5, height=2.8, columns=3)
    quantities = {"loss": "loss (nats)", "reward_margin": "implicit reward margin", "beta_before": "β (KL penalty)"}
    for axes, (column, label) in zip(panels, quantities.items(), strict=True):
        axes.plot(steps["step"], steps[column], linewidth=1.5, **run_styles([title])[title])
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    figure.suptitle(title)
    return figure


def _draw_shares(axes: Axes, table: pd.DataFrame, position: str) -> None:
    for decision, rows in table.groupby("decision", sort=False):
        colour = DECISION_COLOURS[decision]
        axes.plot(rows[position], rows["share"], "o-", color=colour, label=DECISION_LABELS[decision], markersize=4)
        axes.fill_between(rows[position], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("share of pairs, 95 % interval")
