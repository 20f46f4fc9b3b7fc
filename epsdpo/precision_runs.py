"""Runs of a batch folder that show what the precision of the criterion does.

Which final policies to measure, and which runs differ in `criterion_dtype` alone. The measurement of a policy is
`epsdpo.criterion_precision`'s.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from epsdpo.criterion_precision import measure_pairs
from epsdpo.data import load_prepared
from epsdpo.epsilon_bound import load_frozen, precision_of
from epsdpo.experiment import Experiment
from epsdpo.manifest import read_manifest
from epsdpo.models import MODEL_FOLDER, after_sft, reference_source
from epsdpo.paths import resolve_path
from epsdpo.report import Run
from epsdpo.train import trainer_arguments

METHODS = ("dpo", "epsilon_dpo")
PAIRS = 256  # of each run


def typical_runs(runs: Sequence[Run]) -> list[Run]:
    """For each of DPO and ε-DPO the runs of one recipe, one per world: the recipe most like the others of the batch.

    A recipe is what remains of an experiment without names, seeds and the criterion's precision, which the measurement
    sets itself. It is the more typical, the more runs of the batch share each of its training settings.
    """
    common = Counter(item for run in runs for item in _training_settings(run.experiment))
    found = []
    for method in METHODS:
        recipes: dict[str, list[Run]] = {}
        for run in runs:
            if run.experiment.method == method and run.experiment.model.lora is None:
                recipes.setdefault(_recipe(run.experiment), []).append(run)
        if recipes:
            best = max(recipes.values(), key=lambda alike: sum(common[i] for i in _training_settings(alike[0].experiment)))
            found += {_world_seed(run.experiment): run for run in reversed(best)}.values()
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


def _measure_run(run: Run, epsilons: Sequence[float]) -> pd.DataFrame:
    train_dir = run.directory / "train"
    parameters = read_manifest(train_dir)["parameters"]
    # A batch folder may have been moved as a whole since.
    beside = run.directory.parent / Path(parameters["data_dir"]).name
    data = load_prepared(beside if beside.is_dir() else resolve_path(parameters["data_dir"]))
    experiment = after_sft(run.experiment, parameters.get("sft_dir", ""))
    arguments = trainer_arguments(experiment, data, train_dir)
    source, revision = reference_source(experiment.model, experiment.data)
    policy = load_frozen(experiment, str(train_dir / MODEL_FOLDER), arguments.device)
    reference = load_frozen(experiment, source, arguments.device, revision=revision)
    pairs = data.train if data.eval is None else data.eval
    rows = np.unique(np.linspace(0, len(pairs) - 1, PAIRS).round().astype(int))
    with precision_of(arguments):
        return measure_pairs(policy, reference, pairs.select(rows), arguments.max_length, epsilons)


def runs_by_precision(runs: Sequence[Run]) -> pd.DataFrame:
    """ε-DPO runs that have a twin which differs in the criterion's precision alone.

    Returns:
        One row per pair of twins: group (their settings but for seeds, as text), epsilon, seed (of the world and of
        training), and of either precision run_…, mean_step_…, beta_final_… and win_rate_… (percent; NaN if not judged).
    """
    twins: dict[tuple[str, str], dict[str, Run]] = {}
    for run in runs:
        if run.experiment.method == "epsilon_dpo":
            experiment = run.experiment
            seeds = f"{_world_seed(experiment)}/{experiment.seed}"
            twins.setdefault((_recipe(experiment), seeds), {})[experiment.train["criterion_dtype"]] = run
    rows = []
    for (recipe, seeds), by_precision in twins.items():
        if len(by_precision) < 2:
            continue
        row = {"group": recipe, "seed": seeds}
        for precision, run in by_precision.items():
            row["epsilon"] = run.experiment.training_arguments()["epsilon"]
            row |= {f"run_{precision}": run.experiment.title, f"beta_final_{precision}": run.trajectory["beta_final"]}
            row[f"mean_step_{precision}"] = run.trajectory["mean_step"]
            row[f"win_rate_{precision}"] = (run.evaluation or {}).get("win_rate", np.nan)
        rows.append(row)
    return pd.DataFrame(rows)


def differences(twins: pd.DataFrame) -> pd.DataFrame:
    """What bfloat16 changes, over the twins of each setting that differ in their seeds.

    Returns:
        One row per group and measure (mean_step, beta_final, win_rate): epsilon, measure, twins, float32, bfloat16 (means),
        difference (bfloat16 - float32), low, high (95 % t-interval over twins; NaN for one).
    """
    rows = []
    for _, alike in twins.groupby("group", sort=False):
        for measure in ("mean_step", "beta_final", "win_rate"):
            exact, coarse = alike[f"{measure}_float32"], alike[f"{measure}_bfloat16"]
            low, high = _t_interval((coarse - exact).dropna())
            row = {"epsilon": alike["epsilon"].iloc[0], "measure": measure, "twins": int((coarse - exact).count())}
            row |= {"float32": exact.mean(), "bfloat16": coarse.mean(), "difference": (coarse - exact).mean()}
            rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows).sort_values(["measure", "epsilon"], ignore_index=True)


def _t_interval(values: pd.Series) -> tuple[float, float]:
    if len(values) < 2:
        return np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def _recipe(experiment: Experiment) -> str:
    values = experiment.model_dump(exclude={"name", "title", "seed"})
    values["train"].pop("criterion_dtype", None)
    if values["data"]["world"] is not None:
        values["data"]["world"].pop("seed")
    return json.dumps(values, sort_keys=True, default=str)


def _training_settings(experiment: Experiment) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in experiment.train.items() if key != "criterion_dtype"]


def _world_seed(experiment: Experiment) -> int | None:
    return experiment.data.world.seed if experiment.data.speaks_world else None
