"""The tables behind the figures of the claims page: one number per world, their mean, and its interval.

All have one shape: columns that say what a row is of; mean, low and high (Student's t over worlds, NaN with fewer than
two); worlds, how many there are; and a column per world, `world_1` and so on. Which recipes a figure shows, in which
groups, stands in the claims file; recipes without finished runs have no row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.intervals import t_interval
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.keys import setting_of
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.paper.claims.effects import extra_time
from epsdpo.paper.claims.run_table import WITHIN_TRAINING, second_half
from epsdpo.paper.published import table_5
from epsdpo.plots.looks import family_of
from epsdpo.trajectory.summary import DECISIONS, decision_fractions

Groups = Mapping[str, Sequence[str]]  # title of a group -> its recipes
Runs = Mapping[str, tuple[Path, Experiment]]  # of `finished_runs`

SFT = "SFT model"  # the row of the model that all training starts from
HERE, PAPER = "these runs", "paper"

# Contenders of `benchmarks/contenders.py`: ε-DPO -> DPO that keeps logits, or does not, as it does.
PEERS = {"ε-DPO, full logits": "DPO, full logits", "ε-DPO, epsdpo": "DPO, TRL"}

_COMPARED = {  # measure -> what the SFT model has of it: a number by definition, or one that its responses gave
    "win_rate": 50.0,
    "length_controlled_win_rate": 50.0,
    "forward_kl_per_response": 0.0,
    "policy_gold": "reference_gold",
    "policy_tokens": "reference_tokens",
}
_RECIPE = ("group", "recipe", "title", "family", "measure")
_STRETCHES = 20  # of training, over each of which shares of decisions are pooled


def over_worlds(values: pd.DataFrame, keys: Sequence[str], level: float, unit: str = "world") -> pd.DataFrame:
    """Join the numbers of worlds: one row per combination of `keys`, in the order in which they first appear.

    Args:
        values: columns keys, `unit` and value; rows without a value are left out.
        level: coverage of the interval.
        unit: what is repeated, the name of the column that tells repetitions apart.

    Returns:
        Columns keys, mean, low, high, `<unit>s`, and one per world, `<unit>_<its name>`.
    """
    values = values.dropna(subset=["value"])
    units = sorted(values[unit].unique())
    rows = []
    for key, group in values.groupby(list(keys), sort=False, dropna=False):
        numbers = group.set_index(unit)["value"]
        low = high = np.nan
        if len(numbers) > 1:
            interval = t_interval(numbers, level)
            low, high = interval.low, interval.high
        joined = {"mean": numbers.mean(), "low": low, "high": high, f"{unit}s": len(numbers)}
        rows.append(
            dict(zip(keys, key, strict=True)) | joined | {f"{unit}_{name}": numbers.get(name) for name in units}
        )
    return pd.DataFrame(rows, columns=[*keys, "mean", "low", "high", f"{unit}s", *(f"{unit}_{name}" for name in units)])


def main(measures: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """The main comparison: win rates (%), forward KL (nats), gold reward and tokens; the SFT model first."""
    compared = _by_recipe(measures, groups, list(_COMPARED), level)
    shown = measures[measures["recipe"].isin(compared["recipe"])]
    start = [
        {"group": SFT, "recipe": SFT, "title": SFT, "family": "", "measure": name, "world": world}
        | {"value": rows[known].mean() if isinstance(known, str) else known}
        for world, rows in shown.groupby("world")
        for name, known in _COMPARED.items()
    ]
    return pd.concat([over_worlds(_frame(start, _RECIPE), _RECIPE, level), compared], ignore_index=True)


def frontier(measures: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """Figure 4b: win rate (%) and forward KL (nats) of each group's recipes, which differ in β."""
    return _by_recipe(measures, groups, ["win_rate", "forward_kl_per_response"], level, ["beta"])


def initial_beta(measures: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """Final β and win rate (%) of each group's recipes, which differ in the initial β."""
    return _by_recipe(measures, groups, ["beta_final", "win_rate"], level, ["beta"])


def label_noise(measures: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """Gain in gold reward and win rate (%) of each group's recipes, which differ in the temperature of the labels.

    Where the judge is as noisy as the labels, win rates at two temperatures are by two judges; gold rewards are not.
    """
    return _by_recipe(measures, groups, ["gold_gain", "win_rate"], level, ["label_temperature"])


def two_epsilons(measures: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """Table 5: win rate (%) and mean step over ε_c (`epsilon`) and ε_s (`epsilon_step`), here and in the paper.

    The column `source` tells the two apart; the paper's numbers have neither worlds nor interval.
    """
    here = _by_recipe(measures, groups, ["win_rate", "mean_step"], level, ["epsilon", "epsilon_step"])
    paper = [
        {"source": PAPER, "measure": measure, "epsilon": epsilon_c, "epsilon_step": epsilon_s, "mean": value}
        for epsilon_c, epsilon_s, win_rate, mean_step in table_5()
        for measure, value in (("win_rate", win_rate), ("mean_step", mean_step))
    ]
    return pd.concat([here.assign(source=HERE), pd.DataFrame(paper)], ignore_index=True)


def dynamics(runs: Runs, groups: Groups, level: float) -> pd.DataFrame:
    """Figure 3: what changes within the epoch, over `share_of_epoch`, the share of optimiser steps that are done.

    Measures win_rate (%) and forward_kl_per_response (nats) at the checkpoints that were evaluated; relaxed and
    tightened (% of pairs) over stretches of training, placed at their middle.
    """
    rows = []
    for place, folder, _ in _runs_of(runs, groups):
        last = read_steps(folder / "train")["step"].iloc[-1]
        for measure, share, value in (*_at_checkpoints(folder, last), *_decisions_within(folder, last)):
            # Worlds may differ by a pair or two, and so their checkpoints by a fraction of a percent.
            rows.append(place | {"measure": measure, "share_of_epoch": round(share, 3), "value": value})
    keys = ["group", "recipe", "family", "measure", "share_of_epoch"]
    return over_worlds(_frame(rows, keys), keys, level)


def margins(runs: Runs, groups: Groups, level: float) -> pd.DataFrame:
    """Figure 4a: mean implicit reward margin of the pairs of each decision, in the second half of training, by β."""
    rows = []
    for place, folder, experiment in _runs_of(runs, groups):
        pairs = second_half(read_pairs(folder / "train"))
        beta = setting_of(experiment, "beta")
        for decision, number in DECISIONS.items():
            margin = pairs.loc[pairs["decision"] == number, "reward_margin"].mean()
            rows.append(place | {"beta": beta, "decision": decision, "value": margin})
    keys = ["group", "recipe", "family", "beta", "decision"]
    return over_worlds(_frame(rows, keys), keys, level)


def bound(bounds: pd.DataFrame, groups: Groups, level: float) -> pd.DataFrame:
    """Figure 5: mean bound of ε over the share of training, by precision of the criterion and decision.

    Args:
        bounds: one row per run, criterion precision, checkpoint and decision, of `bounds_of`: name, world,
            criterion_dtype, share_of_epoch, decision, bound (NaN where no pair has the decision), share_at_largest,
            largest_epsilon.

    Returns:
        Also share_at_largest, the mean over worlds of the share of pairs that hold up to largest_epsilon, the largest ε
        tried: where it is above 0 the mean bound is a lower limit.
    """
    keys = ["group", "recipe", "criterion_dtype", "decision", "share_of_epoch"]
    if bounds.empty:
        return over_worlds(_frame([], keys), keys, level)
    shown = bounds.assign(
        recipe=[recipe_and_world(name)[0] for name in bounds["name"]],
        share_of_epoch=bounds["share_of_epoch"].round(3),
        value=bounds["bound"],
    )
    grouped = pd.concat([shown[shown["recipe"] == recipe].assign(group=group) for group, recipe in _pairs(groups)])
    grouped = grouped.reindex(columns=[*keys, "world", "value", "share_at_largest", "largest_epsilon"])
    limits = grouped.dropna(subset=["value"]).groupby(keys)[["share_at_largest", "largest_epsilon"]].mean()
    return over_worlds(grouped, keys, level).join(limits, on=keys)


def coverage(table: pd.DataFrame, groups: Groups, level: float) -> str:
    """The end of a figure's caption: over how many worlds its intervals are, and which of its recipes it lacks."""
    recipes = dict.fromkeys(recipe for _, recipe in _pairs(groups))
    missing = [recipe for recipe in recipes if recipe not in set(table["recipe"])]
    text = _intervals(table["worlds"], level) if len(table) else ""
    return text + (f" Without finished runs, and so not shown: {', '.join(missing)}." if missing else "")


def _intervals(worlds: pd.Series, level: float) -> str:
    fewest, most = int(worlds.min()), int(worlds.max())
    if most == 1:
        return " One world has finished so far, which gives no interval."
    count = str(most) if fewest == most else f"{fewest} to {most}"
    return f" Intervals are {level:.0%}, Student's t over {count} worlds."


def read_rounds(path: Path) -> pd.DataFrame:
    """The rounds of `benchmarks/step_cost.py`: contender, length (tokens), round, seconds (median of its steps).

    No row if the benchmark has not run yet.

    Raises:
        ConfigError: if the file is of a benchmark that did not keep its rounds.
    """
    columns = ["contender", "length", "round", "seconds"]
    if not path.exists():
        return pd.DataFrame(columns=columns)
    content = json.loads(path.read_text(encoding="utf-8"))
    if "rounds" not in content:
        raise ConfigError(f"{path}: has no rounds, as before they were kept. Run benchmarks/step_cost.py again")
    return pd.DataFrame(content["rounds"], columns=columns)


def step_cost(rounds: pd.DataFrame, level: float) -> pd.DataFrame:
    """Table 4: by how much (%) a step of ε-DPO takes longer than one of DPO that is computed in a like way.

    The two are compared within each round, which stands in for a world here: mean, low, high, rounds, `round_1` ….

    Args:
        rounds: of `read_rounds`.
    """
    rows = []
    for contender, peer in PEERS.items():
        for (length, turn), percent in extra_time(rounds, contender, peer).items():
            rows.append({"contender": contender, "peer": peer, "length": length, "round": turn, "value": percent})
    keys = ["contender", "peer", "length"]
    return over_worlds(pd.DataFrame(rows, columns=[*keys, "round", "value"]), keys, level, unit="round")


def _by_recipe(
    measures: pd.DataFrame, groups: Groups, names: Sequence[str], level: float, settings: Sequence[str] = ()
) -> pd.DataFrame:
    """Some measures of each group's recipes: columns group, recipe, title, family, measure and the settings."""
    rows = []
    for group, recipe in _pairs(groups):
        for run in measures[measures["recipe"] == recipe].to_dict("records"):
            place = {key: run[key] for key in ("recipe", "title", "family", "world", *settings)}
            rows += [{"group": group, "measure": name, "value": run[name]} | place for name in names]
    keys = [*_RECIPE, *settings]
    return over_worlds(_frame(rows, keys), keys, level)


def _pairs(groups: Groups) -> Iterator[tuple[str, str]]:
    return ((group, recipe) for group, recipes in groups.items() for recipe in recipes)


def _frame(rows: list[dict], keys: Iterable[str]) -> pd.DataFrame:
    """Rows as a frame that has its columns also if there are none."""
    return pd.DataFrame(rows, columns=[*keys, "world", "value"])


def _runs_of(runs: Runs, groups: Groups) -> Iterator[tuple[dict, Path, Experiment]]:
    """Each finished run of the groups' recipes: its place in a table, its folder, its experiment."""
    for group, recipe in _pairs(groups):
        for name, (folder, experiment) in runs.items():
            known, world = recipe_and_world(name)
            if known == recipe:
                place = {"group": group, "recipe": recipe, "family": family_of(experiment), "world": world}
                yield place, folder, experiment


def _at_checkpoints(folder: Path, last: int) -> Iterator[tuple[str, float, float]]:
    path = folder / "evaluate" / WITHIN_TRAINING
    if path.exists():
        for row in pd.read_csv(path).to_dict("records"):
            for measure in ("win_rate", "forward_kl_per_response"):
                yield measure, row["step"] / last, row[measure]


def _decisions_within(folder: Path, last: int) -> Iterator[tuple[str, float, float]]:
    pairs = read_pairs(folder / "train")
    if pairs.empty:  # of a method without decisions
        return
    for row in decision_fractions(pairs, windows=_STRETCHES).itertuples():
        if row.decision != "tied":
            yield row.decision, (row.first_step - 1 + row.last_step) / (2 * last), 100.0 * row.share
