"""What the precision of the criterion does to whole runs, which differ from an exact one in `criterion_dtype` alone."""

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.intervals import Interval, t_interval
from epsdpo.methods.launches import IN_WORDS
from epsdpo.paper.precision.recipes import recipe_of, world_seed
from epsdpo.report.collect import Run
from epsdpo.trajectory.summary import DECISIONS

EXACT = "float32"
MEASURES = ("mean_step", "beta_final", "forward_kl_per_response", "win_rate")


def runs_by_precision(runs: Sequence[Run]) -> pd.DataFrame:
    """ε-DPO runs whose criterion is not exact and that have a twin which differs in that alone, and these twins.

    Returns:
        One row per run: setting (what tells it from the other twins, but for seeds, as text), epsilon, seed (of the
        world and of training), precision (`criterion_dtype`), run (title), mean_step, beta_final,
        forward_kl_per_response (nats) and win_rate (percent); NaN for what was not evaluated.
    """
    rows = []
    for run in runs:
        experiment = run.experiment
        if experiment.method != "epsilon_dpo":
            continue
        measured = run.trajectory | (run.evaluation or {})
        rows.append(
            {
                "recipe": recipe_of(experiment),
                "epsilon": experiment.criterion()["epsilon"],
                "seed": f"{world_seed(experiment)}/{experiment.seed}",
                "precision": experiment.criterion()["criterion_dtype"],
                "run": experiment.title,
                **{measure: measured.get(measure, np.nan) for measure in MEASURES},
            }
        )
    table = pd.DataFrame(rows, columns=["recipe", "epsilon", "seed", "precision", "run", *MEASURES])
    alike = table.assign(exact=table["precision"] == EXACT).groupby(["recipe", "seed"])
    twins = table[alike["exact"].transform("any") & (alike["precision"].transform("nunique") > 1)]
    twins = twins.assign(setting=_told_apart(twins["recipe"])).drop(columns="recipe")
    return twins.sort_values(["epsilon", "setting", "seed", "precision"], ignore_index=True)


def differences(twins: pd.DataFrame) -> pd.DataFrame:
    """What each arithmetic changes against the exact one, over the twins of a setting that differ in their seeds.

    Args:
        twins: from `runs_by_precision`.

    Returns:
        One row per setting, arithmetic and measure, those of an arithmetic together: precision (the arithmetic),
        setting, measure, twins (how many), exact, rounded (means), change (rounded - exact), low, high (95 %
        t-interval over twins; NaN for one).
    """
    rows = []
    for precision in (each for each in IN_WORDS if each != EXACT):
        pairs = twins[twins["precision"] == precision].merge(
            twins[twins["precision"] == EXACT], on=["setting", "seed"], suffixes=("_rounded", "_exact")
        )
        for setting, alike in pairs.groupby("setting", sort=False):
            for measure in MEASURES:
                judged = (
                    alike[[f"{measure}_exact", f"{measure}_rounded"]].set_axis(["exact", "rounded"], axis=1).dropna()
                )
                change = judged["rounded"] - judged["exact"]
                interval = t_interval(change) if len(change) > 1 else Interval(np.nan, np.nan)
                row = {"precision": precision, "setting": setting, "measure": measure, "twins": len(change)}
                row |= {**judged.mean(), "change": change.mean(), "low": interval.low, "high": interval.high}
                rows.append(row)
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
