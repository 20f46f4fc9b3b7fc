"""Up to which ε the decisions of pairs hold over training (Figure 5), for the runs of a batch that kept checkpoints.

How a bound is measured is `epsdpo.epsilon_bound`'s. Here it is measured for several runs and in both precisions of the
criterion, and kept, since models have to be loaded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.claims.settings import recipe_and_world
from epsdpo.data import load_prepared
from epsdpo.epsilon_bound import EPSILONS, measure
from epsdpo.experiment import Experiment
from epsdpo.files import written_whole
from epsdpo.planned import data_folder
from epsdpo.record import read_total_steps
from epsdpo.train import trainer_arguments

PRECISIONS = ("bfloat16", "float32")
PAIRS = 256


def bounds_of(
    runs: dict[str, tuple[Path, Experiment]],
    recipes: Iterable[str],
    keep_in: Path,
    tell: Callable[[str], None] = print,
) -> pd.DataFrame:
    """The bound of each held-out pair at each checkpoint of the runs of `recipes`, averaged by decision.

    Args:
        runs: name -> folder and experiment, of `measures.finished_runs`.
        keep_in: folder for the table of each run and precision; what is there already is not measured again.
        tell: is given a line of progress per run.

    Returns:
        One row per run, precision, checkpoint and decision: name, recipe, world, criterion_dtype, step,
        share_of_epoch, decision (at the smallest ε), pairs (with that decision), of_pairs (all), bound (mean).
    """
    tables = []
    for name, (folder, experiment) in runs.items():
        recipe, world = recipe_and_world(name)
        if recipe not in set(recipes):
            continue
        for precision in PRECISIONS:
            file = keep_in / f"{name}-{precision}.csv"
            if not file.exists():
                tell(f"measuring up to which ε decisions hold: {name}, {precision}")
                keep_in.mkdir(parents=True, exist_ok=True)
                table = _measured(folder, experiment, precision)
                with written_whole(file) as partial:
                    table.to_csv(partial, index=False)
            place = {"name": name, "recipe": recipe, "world": world, "criterion_dtype": precision}
            tables.append(pd.read_csv(file).assign(**place))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _measured(folder: Path, experiment: Experiment, precision: str) -> pd.DataFrame:
    train_dir = folder / "train"
    data = load_prepared(folder.parent / data_folder(experiment))
    held_out = data.train if data.eval is None else data.eval
    experiment = experiment.model_copy(update={"train": {**experiment.train, "criterion_dtype": precision}})
    arguments = trainer_arguments(experiment, data, train_dir)
    bounds = measure(experiment, train_dir, held_out.select(range(min(PAIRS, len(held_out)))), arguments, EPSILONS)
    bounds["share_of_epoch"] = bounds["step"] / read_total_steps(train_dir)
    grouped = bounds.groupby(["step", "share_of_epoch", "decision"], as_index=False)
    table = grouped.agg(pairs=("bound", "size"), bound=("bound", "mean"))
    return table.assign(of_pairs=len(held_out))


def bound_measures(bounds: pd.DataFrame) -> pd.DataFrame:
    """The bounds as measures of runs: early, at a tenth of the epoch, and late, at all checkpoints after a fifth of it.

    A bound is that of relaxed and tightened pairs together; tied ones have none.

    Args:
        bounds: of `bounds_of`.

    Returns:
        One row per run: name, `bound_<early|late>_<precision>`, and `bound_rise_<precision>`, late less early.
    """
    if bounds.empty:  # without columns, when no run was asked for its bound
        return pd.DataFrame(columns=["name"])
    decided = bounds.dropna(subset=["bound"])
    rows = []
    for name, of_run in decided.groupby("name"):
        row = {"name": name}
        for precision, table in of_run.groupby("criterion_dtype"):
            early, late = table[table["share_of_epoch"] < 0.15], table[table["share_of_epoch"] > 0.15]
            for when, rows_then in (("early", early), ("late", late)):
                mean = np.average(rows_then["bound"], weights=rows_then["pairs"]) if len(rows_then) else np.nan
                row[f"bound_{when}_{precision}"] = mean
            row[f"bound_rise_{precision}"] = row[f"bound_late_{precision}"] - row[f"bound_early_{precision}"]
        rows.append(row)
    return pd.DataFrame(rows)
