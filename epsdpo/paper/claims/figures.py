"""Each figure of the claims page: its table, its drawing and what to see in it.

What a figure shows stands in the claims file; recipes without finished runs are left out and named in the caption. How
it reaches the page is left to `epsdpo.plots.save`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from epsdpo.paper.claims import drawing, drawing_within
from epsdpo.paper.claims import figure_tables as tables
from epsdpo.paper.claims.settings import Claims


@dataclass(frozen=True)
class Shown:
    """A figure with its numbers and its caption, the arguments of `epsdpo.plots.save`."""

    figure: Figure
    data: pd.DataFrame
    caption: str


@dataclass(frozen=True)
class Batch:
    """What the figures are made of.

    Attributes:
        claims: which figures show which recipes, and how many worlds there should be.
        runs: of `measures.finished_runs`.
        measures: of `measures.measure_runs`.
        bounds: of `bounds.bounds_of`.
        rounds: of `tables.read_rounds`.
    """

    claims: Claims
    runs: tables.Runs
    measures: pd.DataFrame
    bounds: pd.DataFrame
    rounds: pd.DataFrame

    def groups(self, figure: str) -> tables.Groups:
        return self.claims.figures.get(figure, {})


def main(batch: Batch) -> Shown:
    table = tables.main(batch.measures, batch.groups("main"), batch.claims.level)
    caption = (
        "Left: win rates over the SFT model, raw (filled) and length-controlled (hollow); right: the divergence that "
        "they took. Gold reward and tokens per response are in the CSV."
    )
    return Shown(drawing.main(table), table, caption + _shown_of("main", batch, table))


def frontier(batch: Batch) -> Shown:
    table = tables.frontier(batch.measures, batch.groups("frontier"), batch.claims.level)
    caption = (
        "Win rate over forward KL. A line joins a method's runs in the order of β; β is written beside the first "
        "method's. A method is better where its line lies above another's at the same divergence."
    )
    return Shown(drawing.frontier(table), table, caption + _shown_of("frontier", batch, table))


def two_epsilons(batch: Batch) -> Shown:
    table = tables.two_epsilons(batch.measures, batch.groups("two_epsilons"), batch.claims.level)
    caption = (
        "Win rate and mean step (β⁻ as +1, β⁺ as −1) over the ε that is checked, ε_c, and the ε by which β moves, ε_s; "
        "± is half the interval. On the paper's side are the numbers of its Table 5: another judge, other data, "
        "one run each. From light to dark it is as far in the right map as in the left."
    )
    here = table[table["source"] == tables.HERE]
    return Shown(drawing.two_epsilons(table), table, caption + _shown_of("two_epsilons", batch, here))


def dynamics(batch: Batch) -> Shown:
    table = tables.dynamics(batch.runs, batch.groups("dynamics"), batch.claims.level)
    caption = (
        "Within one epoch: win rate and forward KL at checkpoints, and the shares of pairs that chose β⁻ and β⁺ over "
        "stretches of a twentieth of training. The paper says that all four grow faster with a larger ε, and that "
        "the win rate starts lower."
    )
    return Shown(drawing_within.dynamics(table), table, caption + _shown_of("dynamics", batch, table))


def margins(batch: Batch) -> Shown:
    table = tables.margins(batch.runs, batch.groups("margins"), batch.claims.level)
    caption = (
        "Implicit reward margins in the second half of training, of pairs that the criterion would relax, leave and "
        "tighten. The paper says that pairs that choose β⁺ are those of which the policy is less sure."
    )
    if len(table) and table["worlds"].min() < drawing_within.FEWEST_WORLDS:
        caption += f" Hollow points: in fewer than {drawing_within.FEWEST_WORLDS} worlds, and without an interval."
    return Shown(drawing_within.margins(table), table, caption + _shown_of("margins", batch, table))


def bound(batch: Batch) -> Shown:
    table = tables.bound(batch.bounds, batch.groups("bound"), batch.claims.level)
    caption = (
        "The largest ε up to which a pair's decision stays what it is at the smallest ε tried, averaged over held-out "
        "pairs that are spread evenly over the data. A pair that never changes counts with the largest ε tried "
        "(dash-dotted): hollow points have such pairs and are lower limits; how many there are is in the CSV. Dotted: "
        "where the paper's bounds settle."
    )
    return Shown(drawing_within.bound(table), table, caption + _shown_of("bound", batch, table))


def initial_beta(batch: Batch) -> Shown:
    table = tables.initial_beta(batch.measures, batch.groups("initial_beta"), batch.claims.level)
    caption = (
        "Left: β at the end of training over β at its start; on the dotted line it has not moved. Right: the win rate. "
        "A method that finds its own β would draw flatter lines than DPO."
    )
    return Shown(drawing.initial_beta(table), table, caption + _shown_of("initial_beta", batch, table))


def label_noise(batch: Batch) -> Shown:
    table = tables.label_noise(batch.measures, batch.groups("label_noise"), batch.claims.level)
    caption = (
        "What is lost when labels are noisier, in gold reward and in win rate. The judge is as noisy as the labels, so "
        "that win rates fall for this reason too; gold rewards have no noise."
    )
    return Shown(drawing.label_noise(table), table, caption + _shown_of("label_noise", batch, table))


def step_cost(batch: Batch) -> Shown:
    table = tables.step_cost(batch.rounds, batch.claims.level)
    caption = (
        "Additional time of a step, in each round of the benchmark (dots), and its mean with a "
        f"{batch.claims.level:.0%} interval over rounds of one machine. The paper reports 0.0064 % and 0.0045 % for "
        "whole models on GPUs, whose head is a smaller part of a step."
    )
    return Shown(drawing.step_cost(table), table, caption)


def _shown_of(name: str, batch: Batch, table: pd.DataFrame) -> str:
    """The end of a caption: over how many worlds intervals are, and which recipes are not in the figure."""
    recipes = [recipe for recipes in batch.groups(name).values() for recipe in recipes]
    missing = [recipe for recipe in dict.fromkeys(recipes) if recipe not in set(table["recipe"])]
    text = _intervals(table["worlds"], batch.claims.level) if len(table) else ""
    return text + (f" Without finished runs, and so not shown: {', '.join(missing)}." if missing else "")


def _intervals(worlds: pd.Series, level: float) -> str:
    fewest, most = int(worlds.min()), int(worlds.max())
    if most == 1:
        return " One world has finished so far, which gives no interval."
    count = str(most) if fewest == most else f"{fewest} to {most}"
    return f" Intervals are {level:.0%}, Student's t over {count} worlds."
