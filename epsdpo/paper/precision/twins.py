"""What the precision of the criterion does to whole runs: pairs of runs that differ in `criterion_dtype` alone."""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.intervals import Interval, t_interval
from epsdpo.paper.precision.recipes import recipe_of, world_seed
from epsdpo.report.collect import Run
from epsdpo.trajectory.summary import DECISIONS

MEASURES = ("mean_step", "beta_final", "win_rate")


def runs_by_precision(runs: Sequence[Run]) -> pd.DataFrame:
    """ε-DPO runs that have a twin which differs in the criterion's precision alone.

    Returns:
        One row per run: setting (what tells it from the other twins, but for seeds, as text), epsilon, seed (of the
        world and of training), precision, run (title), mean_step, beta_final, win_rate (percent; NaN if not judged).
    """
    rows = []
    for run in runs:
        experiment = run.experiment
        if experiment.method != "epsilon_dpo":
            continue
        rows.append(
            {
                "recipe": recipe_of(experiment),
                "epsilon": experiment.criterion()["epsilon"],
                "seed": f"{world_seed(experiment)}/{experiment.seed}",
                "precision": experiment.criterion()["criterion_dtype"],
                "run": experiment.title,
                "mean_step": run.trajectory["mean_step"],
                "beta_final": run.trajectory["beta_final"],
                "win_rate": (run.evaluation or {}).get("win_rate", np.nan),
            }
        )
    table = pd.DataFrame(rows, columns=["recipe", "epsilon", "seed", "precision", "run", *MEASURES])
    twins = table[table.groupby(["recipe", "seed"])["precision"].transform("nunique") == 2]
    twins = twins.assign(setting=_told_apart(twins["recipe"])).drop(columns="recipe")
    return twins.sort_values(["epsilon", "setting", "seed", "precision"], ignore_index=True)


def differences(twins: pd.DataFrame) -> pd.DataFrame:
    """What bfloat16 changes, over the twins of each setting that differ in their seeds.

    Args:
        twins: from `runs_by_precision`.

    Returns:
        One row per setting and measure (mean_step, beta_final, win_rate): setting, measure, twins, float32, bfloat16
        (means), difference (bfloat16 - float32), low, high (95 % t-interval over twins; NaN for one).
    """
    rows = []
    for setting, alike in twins.groupby("setting", sort=False):
        for measure in MEASURES:
            by_seed = alike.pivot(index="seed", columns="precision", values=measure).dropna()
            change = by_seed["bfloat16"] - by_seed["float32"]
            interval = t_interval(change) if len(change) > 1 else Interval(np.nan, np.nan)
            row = {"setting": setting, "measure": measure, "twins": len(change), **by_seed.mean()}
            rows.append(row | {"difference": change.mean(), "low": interval.low, "high": interval.high})
    return pd.DataFrame(rows)


def steps_of_twins(runs: Sequence[Run], twins: pd.DataFrame) -> pd.DataFrame:
    """The β records of the runs in `twins`: setting, precision, run, and the columns of `read_steps`."""
    steps = {run.experiment.title: run.steps for run in runs}
    return pd.concat(
        [
            steps[row.run].assign(setting=row.setting, precision=row.precision, run=row.run)
            for row in twins.itertuples()
        ],
        ignore_index=True,
    )


def shares_in_training(runs: Sequence[Run]) -> pd.DataFrame:
    """Mean shares of the decisions over whole runs of ε-DPO, by ε and precision of the criterion.

    Returns:
        One row per precision and ε: precision, epsilon, runs, relaxed, tied, tightened, mean_step.
    """
    rows = [
        {"precision": run.experiment.criterion()["criterion_dtype"], "epsilon": run.experiment.criterion()["epsilon"]}
        | {name: run.trajectory[name] for name in (*DECISIONS, "mean_step")}
        for run in runs
        if run.experiment.method == "epsilon_dpo"
    ]
    table = pd.DataFrame(rows, columns=["precision", "epsilon", *DECISIONS, "mean_step"])
    grouped = table.groupby(["precision", "epsilon"])
    return grouped.mean().assign(runs=grouped.size()).reset_index()


def _told_apart(recipes: pd.Series) -> list[str]:
    """Each recipe as the settings in which the recipes differ, ε always among them."""
    flat = {recipe: pd.json_normalize(json.loads(recipe)).iloc[0].astype(str).to_dict() for recipe in recipes.unique()}
    keys = sorted({key for settings in flat.values() for key in settings})
    differing = [key for key in keys if len({settings.get(key) for settings in flat.values()}) > 1]
    names = {"train.epsilon": "ε", "train.beta": "β", "data.world.label_temperature": "label temperature"}
    shown = dict.fromkeys(["train.epsilon", *differing])
    return [
        ", ".join(f"{names.get(key, key.split('.')[-1])} = {flat[recipe].get(key, '–')}" for key in shown)
        for recipe in recipes
    ]
