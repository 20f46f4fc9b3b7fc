"""Runs of a batch folder that show what the precision of the criterion does.

Which final policies to measure, and which runs differ in `criterion_dtype` alone. The measurement of a policy is
`epsdpo.paper.precision.decisions`'s.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from epsdpo.data.prepared import load_prepared
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.paths import resolve_path
from epsdpo.experiment.schema import ABOUT_EARLIER_PARTS
from epsdpo.models.start import MODEL_FOLDER, after_sft, reference_source
from epsdpo.paper.epsilon_bound import PAIRS, load_frozen, measured_pairs, precision_of
from epsdpo.paper.precision.decisions import measure_pairs
from epsdpo.report.collect import Run
from epsdpo.runs.manifest import read_manifest
from epsdpo.train.preferences import trainer_arguments
from epsdpo.trajectory.summary import DECISIONS

METHODS = ("dpo", "epsilon_dpo")
MEASURES = ("mean_step", "beta_final", "win_rate")

# Keys of `train` that say when a run is looked at or kept, and change nothing in it.
_ONLY_LOOKING = (
    *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_strategy", "eval_steps"),
    *ABOUT_EARLIER_PARTS,
)


def typical_runs(runs: Sequence[Run]) -> list[Run]:
    """For each of DPO and ε-DPO the runs of one recipe, one per world: the recipe most like the others of the batch.

    A recipe is what remains of an experiment without names, seeds and the criterion's precision, which the measurement
    sets itself. It is the more typical, the more runs of the batch share each of its training settings.

    Raises:
        ConfigError: if there is none.
    """
    common = Counter(item for run in runs for item in _training_settings(run.experiment))
    found = []
    for method in METHODS:
        recipes: dict[str, list[Run]] = {}
        for run in runs:
            if run.experiment.method == method and run.experiment.model.lora is None:
                recipes.setdefault(_recipe(run.experiment), []).append(run)
        if recipes:
            best = max(
                recipes.values(), key=lambda alike: sum(common[i] for i in _training_settings(alike[0].experiment))
            )
            found += {_world_seed(run.experiment): run for run in reversed(best)}.values()
    if not found:
        raise ConfigError(
            "no finished run of DPO or ε-DPO without model.lora: there is no policy to measure. Give the folder of a "
            "batch that has one, such as runs/paper-mini"
        )
    return found


def measure_runs(runs: Sequence[Run], epsilons: Sequence[float]) -> pd.DataFrame:
    """`measure_pairs` of each run's final policy on its held-out pairs, with a line of progress for each run.

    Returns:
        Its columns and, before them, run (title) and method.
    """
    tables = []
    for number, run in enumerate(runs, start=1):
        table = _measure_run(run, epsilons)
        tables.append(table.assign(run=run.experiment.title, method=run.experiment.method))
        print(f"policy {number}/{len(runs)}: {run.experiment.title}, {table['pair_id'].nunique()} pairs", flush=True)
    return pd.concat(tables, ignore_index=True)


def measure_untrained(runs: Sequence[Run], epsilons: Sequence[float]) -> pd.DataFrame:
    """`measure_pairs` with the reference as its own policy, once per world: what the criterion decides about nothing.

    Exact arithmetic has no step there; whatever steps is made by rounding.
    """
    one_per_world = {_world_seed(run.experiment): run for run in runs}
    return pd.concat([_measure_run(run, epsilons, trained=False) for run in one_per_world.values()], ignore_index=True)


def _beside(run: Run, folder: str) -> Path:
    """A folder that a run's stages were given; the one in its batch folder, which may have been moved as a whole."""
    beside = run.directory.parent / Path(folder).name
    return beside if beside.is_dir() else resolve_path(folder)


def _measure_run(run: Run, epsilons: Sequence[float], trained: bool = True) -> pd.DataFrame:
    train_dir = run.directory / "train"
    parameters = read_manifest(train_dir)["parameters"]
    data = load_prepared(_beside(run, parameters["data_dir"]))
    sft_dir = parameters.get("sft_dir", "")
    experiment = after_sft(run.experiment, sft_dir and _beside(run, sft_dir))
    arguments = trainer_arguments(experiment, data, train_dir)
    source, revision = reference_source(experiment.model, experiment.data)
    reference = load_frozen(experiment, source, arguments.device, revision=revision)
    policy = load_frozen(experiment, str(train_dir / MODEL_FOLDER), arguments.device) if trained else reference
    with precision_of(arguments):
        return measure_pairs(policy, reference, measured_pairs(data, PAIRS), arguments.max_length, epsilons)


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
                "recipe": _recipe(experiment),
                "epsilon": experiment.criterion()["epsilon"],
                "seed": f"{_world_seed(experiment)}/{experiment.seed}",
                "precision": _precision(experiment),
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
            low, high = _t_interval(change)
            row = {"setting": setting, "measure": measure, "twins": len(change), **by_seed.mean()}
            rows.append(row | {"difference": change.mean(), "low": low, "high": high})
    return pd.DataFrame(rows)


def steps_of_twins(runs: Sequence[Run], twins: pd.DataFrame) -> pd.DataFrame:
    """The β records of the runs in `twins`: setting, precision, run, and the columns of `record.read_steps`."""
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
        {"precision": _precision(run.experiment), "epsilon": run.experiment.criterion()["epsilon"]}
        | {name: run.trajectory[name] for name in (*DECISIONS, "mean_step")}
        for run in runs
        if run.experiment.method == "epsilon_dpo"
    ]
    table = pd.DataFrame(rows, columns=["precision", "epsilon", *DECISIONS, "mean_step"])
    grouped = table.groupby(["precision", "epsilon"])
    return grouped.mean().assign(runs=grouped.size()).reset_index()


def answer(released: pd.DataFrame, miniature: pd.DataFrame, changes: pd.DataFrame) -> str:
    """The study's answer in three sentences, from its numbers.

    Args:
        released, miniature: shares by ε of the released reference runs and of the batch's policies.
        changes: from `differences`; empty if the batch has no twins.
    """
    steps = {
        precision: 1.0 - _shares_of(miniature, precision, "tied").set_index("epsilon")["share"]
        for precision in ("float32", "bfloat16")
    }
    low, high = miniature["epsilon"].min(), miniature["epsilon"].max()
    occurrence = (
        f"On held-out pairs of this batch's policies, {steps['float32'][low]:.0%} step in float32 at ε = {low:g} and "
        f"{steps['float32'][high]:.0%} at ε = {high:g}; in bfloat16 {steps['bfloat16'][low]:.0%} and "
        f"{steps['bfloat16'][high]:.0%}."
    )
    model = (
        "Where the sums alone are rounded, the model, which has no free parameter, misses no share by more than "
        f"{_largest_miss(miniature):.0f} points there and {_largest_miss(released):.0f} on the released code's "
        f"reference runs; rounding the tokens as well moves shares by up to {_effect_of_tokens(miniature):.0f} and "
        f"{_effect_of_tokens(released):.0f} points."
    )
    if changes.empty:
        consequence = (
            "What it does to β and to the win rate this folder cannot show: it holds no two ε-DPO runs that differ in "
            "`criterion_dtype` alone."
        )
    else:
        parts = [_change_in_words(rows.set_index("measure")) for _, rows in changes.groupby("setting", sort=False)]
        consequence = f"With bfloat16 in place of float32, {'; '.join(parts)}."
    return "\n\n".join((occurrence, model, consequence))


def _change_in_words(of_setting: pd.DataFrame) -> str:
    beta, win_rate = of_setting.loc["beta_final"], of_setting.loc["win_rate"]
    text = f"at {beta['setting']} β ends at {beta['bfloat16']:.3g} in place of {beta['float32']:.3g}"
    if not win_rate["twins"]:
        return f"{text} (win rates were not judged)"
    text += f" and the win rate moves by {win_rate['difference']:+.1f} points"
    if np.isnan(win_rate["low"]):
        return f"{text} (one pair of runs, no interval)"
    chance = ", which may be chance" if win_rate["low"] <= 0.0 <= win_rate["high"] else ""
    return f"{text} [{win_rate['low']:+.1f}, {win_rate['high']:+.1f}]{chance}"


def _largest_miss(table: pd.DataFrame) -> float:
    rounded = table[table["arithmetic"] == "sums_rounded"]
    return 100.0 * (rounded["share"] - rounded["predicted"]).abs().max()


def _effect_of_tokens(table: pd.DataFrame) -> float:
    by_arithmetic = table.pivot(index=["epsilon", "decision"], columns="arithmetic", values="share")
    return 100.0 * (by_arithmetic["bfloat16"] - by_arithmetic["sums_rounded"]).abs().max()


def _shares_of(table: pd.DataFrame, arithmetic: str, decision: str) -> pd.DataFrame:
    return table[(table["arithmetic"] == arithmetic) & (table["decision"] == decision)]


def _t_interval(values: pd.Series) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def _recipe(experiment: Experiment) -> str:
    """What decides a run's outcome but for seeds and the criterion's precision; not how often it is looked at."""
    values = experiment.model_dump(exclude={"name": True, "title": True, "seed": True, "trajectory": True})
    for key in ("criterion_dtype", *_ONLY_LOOKING):
        values["train"].pop(key, None)
    values["train"] |= {key: value for key, value in experiment.criterion().items() if key == "epsilon"}
    values["data"]["world"].pop("seed")
    (values["evaluate"] or {}).pop("checkpoints", None)
    return json.dumps(values, sort_keys=True, default=str)


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


def _precision(experiment: Experiment) -> str:
    return experiment.criterion()["criterion_dtype"]


def _training_settings(experiment: Experiment) -> list[tuple[str, str]]:
    left_out = ("criterion_dtype", *_ONLY_LOOKING)
    settings = [(key, str(value)) for key, value in experiment.train.items() if key not in left_out]
    return [*settings, ("label_temperature", str(experiment.data.world.label_temperature))]


def _world_seed(experiment: Experiment) -> int | None:
    return experiment.data.world.seed if experiment.data.speaks_world else None
