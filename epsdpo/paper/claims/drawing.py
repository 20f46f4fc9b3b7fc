"""Figures of the claims page that compare recipes; each is drawn of the table that has its name.

Points are means over worlds, bars their intervals, faint dots the worlds. Where a table is empty the figure says so.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from epsdpo.plots.looks import FAMILIES, STARTING_MODEL, Look, run_looks
from epsdpo.plots.style import NEUTRAL, legend_below, new_figure

WIN_RATE = "win rate over the SFT model (%)"
FORWARD_KL = "KL(π_ref‖π) per response (nats)"

_DOTS = {"s": 9, "alpha": 0.35, "linewidths": 0, "zorder": 1}


def main(table: pd.DataFrame) -> Figure:
    """Raw and length-controlled win rate and forward KL of each recipe, a row each."""
    if table.empty:
        return nothing_to_show()
    titles = list(dict.fromkeys(table["title"]))
    families = dict(table[["title", "family"]].itertuples(index=False))
    looks = run_looks({title: family for title, family in families.items() if family})
    figure, panels = new_figure(width=10.5, height=1.3 + 0.5 * len(titles), columns=2)
    for height, title in enumerate(reversed(titles)):
        rows, look = table[table["title"] == title].set_index("measure"), looks.get(title, FAMILIES[STARTING_MODEL])
        worlds = worlds_of(table)
        _row(panels[0], rows.loc["win_rate"], height + 0.12, look, worlds)
        _row(panels[0], rows.loc["length_controlled_win_rate"], height - 0.2, look, worlds, filled=False)
        _row(panels[1], rows.loc["forward_kl_per_response"], height, look, worlds)
    for axes, label in zip(panels, (WIN_RATE, FORWARD_KL), strict=True):
        axes.set_ylim(-0.6, len(titles) - 0.4)
        axes.set_yticks(range(len(titles)), list(reversed(titles)))
        axes.set_xlabel(label)
    panels[0].axvline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    panels[1].set_yticklabels([])
    panels[1].set_xlim(left=-0.02 * panels[1].get_xlim()[1])
    figure.suptitle("What each method gains over the SFT model, and how far it moves")
    kinds = [
        Line2D([], [], color=NEUTRAL, marker="o", linestyle="", markerfacecolor=face) for face in (NEUTRAL, "white")
    ]
    legend_below(figure, kinds, ["raw win rate", "length-controlled win rate"])
    return figure


def frontier(table: pd.DataFrame) -> Figure:
    """Figure 4b: win rate over forward KL, a line per group through its values of β."""
    if table.empty:
        return nothing_to_show()
    figure, (axes,) = new_figure(height=5.4)
    for number, (group, look) in enumerate(looks_of(table).items()):
        rows = table[table["group"] == group]
        wins, divergence = (
            rows[rows["measure"] == measure].set_index("recipe") for measure in ("win_rate", "forward_kl_per_response")
        )
        divergence = divergence.loc[wins.index]
        bars = {"xerr": _half(divergence), "yerr": _half(wins), "elinewidth": 0.9, "capsize": 2}
        axes.errorbar(divergence["mean"], wins["mean"], **bars, fmt="none", color=look.colour)
        axes.plot(divergence["mean"], wins["mean"], **style_of(look), label=group)
        axes.scatter(divergence[worlds_of(table)], wins[worlds_of(table)], color=look.colour, **_DOTS)
        # One curve is enough to see which way β goes; on more the numbers would lie on each other.
        for recipe in wins.index if number == 0 else ():
            axes.annotate(
                f"β = {wins.loc[recipe, 'beta']:g}",
                (divergence.loc[recipe, "mean"], wins.loc[recipe, "mean"]),
                (7, -13),
                textcoords="offset points",
                color=look.colour,
                path_effects=[withStroke(linewidth=3.0, foreground="white")],
            )
    divergences = table.loc[table["measure"] == "forward_kl_per_response", ["mean", *worlds_of(table)]].to_numpy(float)
    log_axis(axes.xaxis)
    axes.set_xlim(np.nanmin(divergences) / 1.15, np.nanmax(divergences) * 1.15)
    axes.axhline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.set_xlabel(FORWARD_KL)
    axes.set_ylabel(WIN_RATE)
    axes.set_title("Win rate for divergence, over β: higher and further left is better")
    legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def initial_beta(table: pd.DataFrame) -> Figure:
    """β at the end of training and win rate over β at its start, a line per group."""
    if table.empty:
        return nothing_to_show()
    figure, panels = new_figure(columns=2)
    betas = sorted(table["beta"].unique())
    places = {beta: np.log(beta) for beta in betas}
    apart = 0.035 * np.ptp([*places.values()])
    # Groups stand a little apart, but not on the left: there a β that stayed must lie on the dotted line.
    for axes, (measure, label, dodge) in zip(
        panels, (("beta_final", "β at the end (log scale)", 0.0), ("win_rate", WIN_RATE, apart)), strict=True
    ):
        _lines_over(axes, table[table["measure"] == measure], "beta", places, dodge)
        axes.set_xlabel("β at the start (log scale)")
        axes.set_ylabel(label)
    log_axis(panels[0].yaxis)
    panels[0].plot([places[beta] for beta in betas], betas, color=NEUTRAL, linestyle=":", linewidth=1.0)
    panels[1].axhline(50.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    figure.suptitle("How much depends on the initial β (dotted: β as it began; a win rate of one half)")
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def label_noise(table: pd.DataFrame) -> Figure:
    """Gain in gold reward and win rate over the temperature of the labels."""
    if table.empty:
        return nothing_to_show()
    figure, panels = new_figure(columns=2)
    places = {
        temperature: float(place) for place, temperature in enumerate(sorted(table["label_temperature"].unique()))
    }
    labels = {"gold_gain": "gold reward, gain over the SFT model", "win_rate": WIN_RATE}
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        _lines_over(axes, table[table["measure"] == measure], "label_temperature", places, dodge=0.05)
        axes.set_xlim(-0.3, len(places) - 0.7)
        axes.set_xlabel("temperature of the labels: higher is noisier")
        axes.set_ylabel(label)
    figure.suptitle("What noisier labels cost")
    legend_below(figure, *panels[0].get_legend_handles_labels())
    return figure


def two_epsilons(table: pd.DataFrame) -> Figure:
    """Table 5: win rate and mean step over ε_c and ε_s as maps, these runs beside the paper's."""
    sources = list(dict.fromkeys(table["source"]))
    figure, panels = new_figure(width=4.5 * len(sources), height=7.0, rows=2, columns=len(sources))
    for number, (measure, label, digits) in enumerate((("win_rate", WIN_RATE, 1), ("mean_step", "mean step", 2))):
        maps = dict(iter(table[table["measure"] == measure].groupby("source", sort=False)))
        # As many points from light to dark in both maps, or what is noise in one would look as large as the other.
        span = max(np.ptp(rows["mean"]) for rows in maps.values())
        for axes, (source, rows) in zip(panels[number * len(sources) :], maps.items(), strict=False):
            _map(axes, rows, span, digits)
            # The paper's win rate is another: PairRM's, over the chosen responses of Anthropic-HH.
            axes.set_title(
                f"{source}: {'win rate (%)' if (source, measure) == ('paper', 'win_rate') else label}", fontsize=10
            )
    between = " " if len(sources) > 1 else "\n"  # with no run finished the paper's maps stand alone
    figure.suptitle(f"The size ε_c that is checked,{between}and the size ε_s of the step")
    return figure


def step_cost(table: pd.DataFrame) -> Figure:
    """Table 4: by how much a step of ε-DPO takes longer than a like one of DPO."""
    if table.empty:
        return nothing_to_show()
    figure, (axes,) = new_figure(height=1.8 + 0.5 * len(table))
    rounds = [column for column in table if column.startswith("round_")]
    for height, row in zip(range(len(table) - 1, -1, -1), table.to_dict("records"), strict=True):
        _row(axes, pd.Series(row), height, FAMILIES["epsilon_dpo float32"], rounds)  # the benchmark's precision
    axes.axvline(0.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
    axes.set_ylim(-0.6, len(table) - 0.4)
    names = [f"{row.contender}\nover {row.peer}" for row in table.itertuples()]
    axes.set_yticks(range(len(table)), list(reversed(names)))
    axes.set_xlabel("additional time of a step (%)")
    axes.set_title("What a step of ε-DPO takes longer than one of DPO")
    return figure


def nothing_to_show() -> Figure:
    """A figure that says that there is nothing in it."""
    figure, (axes,) = new_figure(height=1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, "No finished run of what this figure shows.", ha="center", va="center", color=NEUTRAL)
    return figure


def looks_of(table: pd.DataFrame) -> dict[str, Look]:
    """How each group of a table is drawn: as its method, in shades where groups share one."""
    return run_looks(dict(table[["group", "family"]].drop_duplicates("group").itertuples(index=False)))


def style_of(look: Look) -> dict[str, str | float]:
    """A look as keyword arguments of a line with markers."""
    return {"color": look.colour, "linestyle": look.line, "marker": look.marker, "linewidth": 1.8}


def worlds_of(table: pd.DataFrame) -> list[str]:
    """The columns of a table that hold a number per world."""
    return [column for column in table if column.startswith("world_")]


def log_axis(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, also where it covers less than a decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _half(rows: pd.DataFrame) -> np.ndarray:
    """Half the width of the intervals, which are symmetric; NaN draws no bar."""
    return (rows["high"] - rows["mean"]).to_numpy(float)


def _row(axes: Axes, row: pd.Series, height: float, look: Look, units: Sequence[str], filled: bool = True) -> None:
    """A mean with its interval at a height, and the dots of its `units`, columns of the row, a little above."""
    values = row[units].to_numpy(float)
    axes.scatter(values, np.full(len(values), height + 0.13), color=look.colour, **_DOTS)
    axes.errorbar(
        row["mean"],
        height,
        xerr=row["high"] - row["mean"],
        fmt=look.marker,
        color=look.colour,
        markerfacecolor=look.colour if filled else "white",
        capsize=3,
    )


def _lines_over(axes: Axes, table: pd.DataFrame, setting: str, places: dict[float, float], dodge: float) -> None:
    """A line per group over a setting, whose values stand at `places`; groups stand `dodge` apart from each other."""
    looks = looks_of(table)
    for number, (group, look) in enumerate(looks.items()):
        rows = table[table["group"] == group].sort_values(setting)
        x = rows[setting].map(places).to_numpy(float) + dodge * (number - (len(looks) - 1) / 2)
        axes.errorbar(x, rows["mean"], yerr=_half(rows), fmt="none", color=look.colour, elinewidth=0.9, capsize=2)
        axes.plot(x, rows["mean"], **style_of(look), label=group)
        values = rows[worlds_of(table)].to_numpy(float)
        axes.scatter(np.broadcast_to(x[:, None], values.shape), values, color=look.colour, **_DOTS)
    axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(places.values()), [f"{value:g}" for value in places])


def _map(axes: Axes, rows: pd.DataFrame, span: float, digits: int) -> None:
    """Means over ε_s (across) and ε_c (up), with half the interval under each.

    The smallest mean is white; one that lies `span` above it is as dark as any gets.
    """
    columns, lines = sorted(rows["epsilon_step"].unique()), sorted(rows["epsilon"].unique())
    axes.set_xlabel("ε_s")
    axes.set_ylabel("ε_c")
    axes.grid(visible=False)
    means = rows.pivot(index="epsilon", columns="epsilon_step", values="mean").reindex(lines)[columns].to_numpy(float)
    low = np.nanmin(means)
    # Up to half of the map's colours only: black letters stay legible on them.
    axes.imshow(means, cmap="Blues", vmin=low, vmax=low + 2.0 * span, origin="lower", aspect="auto")
    for row in rows.to_dict("records"):
        half = "" if np.isnan(row["low"]) else f"\n± {row['high'] - row['mean']:.{digits}f}"
        place = columns.index(row["epsilon_step"]), lines.index(row["epsilon"])
        axes.text(*place, f"{row['mean']:.{digits}f}{half}", ha="center", va="center")
    axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axes.set_yticks(range(len(lines)), [f"{value:g}" for value in lines])
