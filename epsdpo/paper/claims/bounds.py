"""Up to which ε the decisions of pairs hold over training (Figure 5), for the runs of a batch that kept checkpoints.

A bound is measured in both precisions of the criterion, and kept, since models have to be loaded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from epsdpo.data.prepared import load_prepared
from epsdpo.experiment import Experiment
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.files import written_whole
from epsdpo.methods.record import read_total_steps
from epsdpo.models.start import after_sft
from epsdpo.paper.claims.names import AT_LARGEST
from epsdpo.paper.epsilon_bound import EPSILONS, PAIRS, mean_bounds, measure_run, measured_pairs
from epsdpo.runs.layout import BOUNDS, data_folder, sft_folder
from epsdpo.runs.manifest import read_manifest

PRECISIONS = ("bfloat16", "float32")
EARLY = 0.15  # of training: the measures tell checkpoints before it from those after it

_KEPT = ["training", "step", "pair_id", "prompt", "decision", "bound"]
_AVERAGED = ["name", "criterion_dtype", "share_of_epoch", "pairs", "bound", "share_at_largest", "largest_epsilon"]


def bounds_of(
    runs: dict[str, tuple[Path, Experiment]],
    recipes: Iterable[str],
    tell: Callable[[str], None] = print,
) -> pd.DataFrame:
    """The bound of each measured pair at each checkpoint of the runs of `recipes`, averaged by decision.

    Bounds are kept beside the stages of each run, a file for each precision. Those of the same training and the same
    pairs are not measured again.

    Args:
        runs: name -> folder and experiment.
        tell: is given a line of progress per run.

    Returns:
        One row per run, precision, checkpoint and decision: name, recipe, world, criterion_dtype, share_of_epoch (of
        the run's steps), and the columns of `epsilon_bound.mean_bounds`.
    """
    tables = []
    for name, (folder, experiment) in runs.items():
        recipe, world = recipe_and_world(name)
        if recipe not in set(recipes):
            continue
        for precision in PRECISIONS:
            bounds = _kept_or_measured(
                folder / BOUNDS / f"{precision}.csv",
                folder,
                experiment.model_copy(update={"train": {**experiment.train, "criterion_dtype": precision}}),
                lambda name=name, precision=precision: tell(
                    f"measuring up to which ε decisions hold: {name}, {precision}"
                ),
            )
            table = mean_bounds(bounds, EPSILONS, experiment.seed)
            table["share_of_epoch"] = table["step"] / read_total_steps(folder / "train")
            tables.append(table.assign(name=name, recipe=recipe, world=world, criterion_dtype=precision))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _kept_or_measured(file: Path, folder: Path, experiment: Experiment, tell: Callable[[], None]) -> pd.DataFrame:
    """The bound of each pair, `epsilon_bound.measure`, from `file` if it is of this training and these pairs."""
    data = load_prepared(folder.parent / data_folder(experiment))
    training = read_manifest(folder / "train")["key"]
    if file.exists():
        kept = pd.read_csv(file, dtype={"pair_id": str, "prompt": str, "training": str}).reindex(columns=_KEPT)
        these = set(kept["pair_id"]) == set(measured_pairs(data, PAIRS)["pair_id"])
        if these and set(kept["training"]) == {training}:
            return kept
    tell()
    sft_dir = folder.parent / sft_folder(experiment) if experiment.model.sft else ""
    bounds = measure_run(after_sft(experiment, sft_dir), folder / "train", data, EPSILONS, PAIRS)
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as partial:
        bounds.assign(training=training)[_KEPT].to_csv(partial, index=False)
    return bounds


def bound_measures(bounds: pd.DataFrame) -> pd.DataFrame:
    """The bounds as measures of runs: the mean over the checkpoints of early training, and over all later ones.

    A mean is over relaxed and tightened pairs together, each checkpoint counting with its pairs; tied ones have no
    bound. With a checkpoint per tenth of training, the early one is that at a tenth and the later are those from a
    fifth on.

    Args:
        bounds: of `bounds_of`.

    Returns:
        One row per run: name; per precision `bound_<early|late>_<precision>` and `bound_rise_<precision>`, late less
        early; likewise, ending in `AT_LARGEST`, the share of the pairs that hold up to the largest ε tried, of the rise
        that of all checkpoints; largest_epsilon. A mean with such pairs is a lower limit.
    """
    if bounds.empty:  # without columns, when no run was asked for its bound
        return pd.DataFrame(columns=["name"])
    decided = bounds.dropna(subset=["bound"]).reindex(columns=_AVERAGED)
    rows = []
    for name, of_run in decided.groupby("name"):
        row = {"name": name, "largest_epsilon": of_run["largest_epsilon"].max()}
        for precision, table in of_run.groupby("criterion_dtype"):
            early, late = table[table["share_of_epoch"] < EARLY], table[table["share_of_epoch"] > EARLY]
            for when, rows_then in (("early", early), ("late", late), ("rise", table)):
                measure = f"bound_{when}_{precision}"
                row[measure] = _over_pairs(rows_then, "bound")
                row[f"{measure}{AT_LARGEST}"] = _over_pairs(rows_then, "share_at_largest")
            row[f"bound_rise_{precision}"] = row[f"bound_late_{precision}"] - row[f"bound_early_{precision}"]
        rows.append(row)
    return pd.DataFrame(rows)


def _over_pairs(rows: pd.DataFrame, column: str) -> float:
    return float(np.average(rows[column], weights=rows["pairs"])) if len(rows) else np.nan
