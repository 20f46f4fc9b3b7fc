"""Figures of the β record: β over steps, the decisions over training, and which pairs they fell on."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from epsdpo.plots.looks import line_of, run_looks
from epsdpo.plots.style import (
    DECISION_COLOURS,
    DECISION_LABELS,
    LOG_RATIO,
    NEUTRAL,
    NOTE,
    SIDES,
    legend_below,
    named,
    new_figure,
)

_MARKERS_PER_LINE = 12
_MOST_THIN_LINES = 4  # runs whose single steps are drawn; those of more hide one another
_WIDE = 10.0  # a ratio of levels from which a logarithmic axis is needed to see them all


def beta_trajectory(
    runs: Mapping[str, pd.DataFrame],
    families: Mapping[str, str],
    title: str,
    published: Mapping[str, pd.DataFrame | None] = MappingProxyType({}),
) -> Figure:
    """β before each optimiser step, one line per run; where not every step was logged, each row has a marker.

    A row of a log is the mean over its steps, and stands at their middle. Bands lie behind the lines.

    Args:
        runs: title of a run -> its steps, from `read_steps` or `read_log`.
        families: title of a run -> its family, from `family_of`.
        title: what to see.
        published: title of a run -> step, low and high of its published repeats; None or left out where there are none.
    """
    figure, (axes,) = new_figure()
    bands = {name: band for name, band in published.items() if band is not None}
    for name, look in run_looks(families).items():
        if name in bands:
            band = bands[name]
            label = f"{name}, published"
            axes.fill_between(band["step"], band["low"], band["high"], color=look.colour, alpha=0.25, label=label, lw=0)
    _draw_runs(axes, runs, families, "step", "beta_before")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("β (KL penalty)")
    if not _fit_scale(axes, [steps["beta_before"].iloc[0] for steps in runs.values()]):
        axes.set_ylim(bottom=0.0)
    axes.set_title(title)
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def relative_trajectory(runs: Mapping[str, pd.DataFrame], families: Mapping[str, str], title: str) -> Figure:
    """β over that of the run's configuration against the share of the run, from `relative_steps`.

    As `beta_trajectory`; runs of which nobody knows the configuration's β are named and not drawn.
    """
    figure, (axes,) = new_figure()
    known = {name: steps for name, steps in runs.items() if steps["beta_ratio"].notna().any()}
    _draw_runs(axes, known, {name: families[name] for name in known}, "share_of_run", "beta_ratio")
    if missing := [name for name in runs if name not in known]:
        axes.annotate(f"β of the config not known: {named(missing)}", (0.03, 0.03), **NOTE)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the run")
    axes.set_ylabel("β over that of the config")
    axes.set_ylim(bottom=0.0)
    axes.set_title(title)
    if known:
        legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def _draw_runs(
    axes: Axes, runs: Mapping[str, pd.DataFrame], families: Mapping[str, str], position: str, column: str
) -> None:
    """A line per run, with markers at every logged row, or at some where every step was logged."""
    for place, (name, look) in enumerate(run_looks(families).items()):
        steps = runs[name]
        every = max(1, len(steps) // _MARKERS_PER_LINE) if _every_step(steps) else 1
        # Runs with the same constant β lie on one another: their markers stand at different steps.
        first = place * every // len(runs)
        markers = {"marker": look.marker, "markersize": 5, "markevery": (first, every)}
        axes.plot(steps[position], steps[column], label=name, linewidth=1.8, **markers, **line_of(look))


def _every_step(steps: pd.DataFrame) -> bool:
    return bool((steps["step"].diff().dropna() == 1).all())


def training_curves(runs: Mapping[str, pd.DataFrame], families: Mapping[str, str]) -> Figure:
    """Loss, log-ratio margin and accuracy over steps; thin lines are steps, thick ones a running mean over a tenth.

    Of more than a few runs only the means are drawn. A panel says which runs do not have its quantity, such as the
    margin of a method without a reference.
    """
    quantities = {
        "loss": "loss (nats)",
        "log_ratio_margin": "log-ratio margin z − γ (nats)",
        "reward_accuracy": "pairs with margin > 0",
    }
    figure = _curves(runs, families, quantities, "Training: the loss depends on β, the log-ratio margin does not")
    figure.axes[2].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def logged_curves(runs: Mapping[str, pd.DataFrame], families: Mapping[str, str]) -> Figure:
    """Loss, implicit reward margin and mean step, which logs made without this kit have too; as `training_curves`."""
    quantities = {
        "loss": "loss (nats)",
        "reward_margin": "implicit reward margin",
        "mean_step": "mean step (relaxed − tightened)",
    }
    return _curves(runs, families, quantities, "Training, and which way the pairs would move β")


def _curves(
    runs: Mapping[str, pd.DataFrame], families: Mapping[str, str], quantities: Mapping[str, str], title: str
) -> Figure:
    """A panel per quantity: a column of the steps -> its label."""
    figure, panels = new_figure(height=3.4, width=10.5, columns=len(quantities))
    drawn = {}  # a run that lacks one panel's quantity may have another's
    for axes, (column, label) in zip(panels, quantities.items(), strict=True):
        missing = [name for name, steps in runs.items() if steps[column].isna().all()]
        if missing:
            axes.annotate(f"not defined for {named(missing)}", (0.03, 0.03), **NOTE)
        for name, look in run_looks(families).items():
            if name in missing:
                continue
            steps = runs[name]
            if len(runs) <= _MOST_THIN_LINES:
                axes.plot(steps["step"], steps[column], color=look.colour, alpha=0.25, linewidth=0.8)
            # An odd number of rows, since the middle of an even one lies half a row further on.
            smooth = steps[column].rolling(len(steps) // 10 | 1, center=True, min_periods=1).mean()
            (drawn[name],) = axes.plot(steps["step"], smooth, label=name, linewidth=1.8, **line_of(look))
        if column == "loss":
            _fit_scale(axes, [steps[column].median() for steps in runs.values()])
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    figure.suptitle(title)
    if drawn:
        legend_below(figure, list(drawn.values()), list(drawn))
    return figure


def _fit_scale(axes: Axes, levels: Sequence[float]) -> bool:
    """A logarithmic axis where the levels of the runs lie far apart, such as SimPO's β and DPO's; whether it is one."""
    wide = min(levels) > 0 and max(levels) / min(levels) > _WIDE
    if wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    return wide


def decision_fractions(fractions: pd.DataFrame, title: str) -> Figure:
    """Shares of the decisions over training, with 95 % intervals."""
    figure, (axes,) = new_figure()
    _draw_shares(axes, fractions, "step")
    axes.set_xlabel("optimiser step")
    axes.set_title(title)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def decisions_by(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """Shares of the decisions against quantities of the pair, one panel each, with 95 % intervals.

    Args:
        tables: label of a quantity, with its unit -> its table from the summary's `decisions_by`.
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


def live(steps: pd.DataFrame, title: str, colour: str = NEUTRAL) -> Figure:
    """Loss, implicit reward margin and β of a run that is still training, in the colour of its method.

    Beside them are the log-ratios of its chosen and rejected responses, apart.
    """
    figure, (*panels, apart) = new_figure(width=11.5, height=2.8, columns=4)
    quantities = {"loss": "loss (nats)", "reward_margin": "implicit reward margin", "beta_before": "β (KL penalty)"}
    for axes, (column, label) in zip(panels, quantities.items(), strict=True):
        axes.plot(steps["step"], steps[column], linewidth=1.5, color=colour)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    apart.sharex(panels[0])
    for side, line in SIDES.items():
        apart.plot(steps["step"], steps[f"{side}_log_ratio"], linewidth=1.5, label=side, **line)
    apart.axhline(0.0, color=NEUTRAL, linewidth=0.8, linestyle=":")
    apart.set_xlabel("optimiser step")
    apart.set_ylabel(LOG_RATIO)
    if steps["chosen_log_ratio"].isna().all():
        apart.annotate("no log-ratios", (0.03, 0.03), **NOTE)
    else:
        apart.legend(frameon=False, fontsize="small")
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
