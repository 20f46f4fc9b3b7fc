"""The figure of the study on real text: mean steps over ε, measured and foretold, beside what the paper prints."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from epsdpo.methods.launches import IN_WORDS
from epsdpo.paper.published import table_5
from epsdpo.plots.looks import FAMILIES
from epsdpo.plots.style import NEUTRAL, legend_below, new_figure

_COLUMNS = 3
_DRAWN = ("float32", "bfloat16_logits", "bfloat16")


def mean_steps_over_epsilon(steps: pd.DataFrame, called: Mapping[str, str], title: str) -> Figure:
    """Mean steps over ε, a panel per policy: points with 95 % intervals, lines as foretold, Table 5's as crosses.

    Args:
        steps: of `mean_steps`.
        called: policy -> title of its panel.
        title: what to see.
    """
    columns = min(_COLUMNS, len(called))
    lines = -(-len(called) // columns)
    figure, panels = new_figure(width=max(5.5, 3.9 * columns), height=1.2 + 2.9 * lines, rows=lines, columns=columns)
    for axes in panels[len(called) :]:
        axes.remove()
    handles = {}
    epsilons = sorted(steps["epsilon"].unique())
    drawn = steps.loc[steps["arithmetic"].isin(_DRAWN), ["low", "high", "predicted"]]
    largest = max(float(drawn.abs().max(axis=None)), *(abs(row[3]) for row in table_5()))
    for axes, (policy, name) in zip(panels, called.items(), strict=False):
        for place, arithmetic in enumerate(_DRAWN):
            look = FAMILIES[f"epsilon_dpo {arithmetic}"]
            rows = steps[(steps["policy"] == policy) & (steps["arithmetic"] == arithmetic)]
            errors = np.clip([rows["mean_step"] - rows["low"], rows["high"] - rows["mean_step"]], 0.0, None)
            beside = rows["epsilon"] * 1.06 ** (place - 1)  # arithmetics of one ε lie beside each other
            handles[f"{IN_WORDS[arithmetic]}, measured"] = axes.errorbar(
                beside, rows["mean_step"], yerr=errors, fmt=look.marker, color=look.colour, markersize=4, capsize=2
            )
            if arithmetic != "float32":
                (handles[f"{IN_WORDS[arithmetic]}, foretold"],) = axes.plot(
                    rows["epsilon"], rows["predicted"], color=look.colour, linewidth=1.4
                )
        (handles["Table 5 of the paper"],) = axes.plot(
            [row[0] for row in table_5()], [row[3] for row in table_5()], "x", color=NEUTRAL, markersize=6
        )
        axes.axhline(0.0, color=NEUTRAL, linestyle=":", linewidth=1.0)
        axes.set_xscale("log")
        axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
        axes.minorticks_off()
        axes.set_ylim(-1.08 * largest, 1.08 * largest)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("ε of the criterion")
    for axes in panels[: len(called) : columns]:
        axes.set_ylabel("mean step, share of β⁻ less β⁺")
    figure.suptitle(title)
    legend_below(figure, list(handles.values()), list(handles))
    return figure
