"""What the criterion decides on the held-out pairs of finished runs, with their final policies and without."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from epsdpo.data.prepared import load_prepared
from epsdpo.experiment.paths import resolve_path
from epsdpo.models.start import after_sft, start_of
from epsdpo.paper.epsilon_bound import PAIRS, measured_pairs
from epsdpo.paper.frozen import load_frozen, precision_of
from epsdpo.paper.precision.decisions import measure_pairs
from epsdpo.paper.precision.recipes import world_seed
from epsdpo.report.collect import Run
from epsdpo.runs.layout import MODEL_FOLDER
from epsdpo.runs.manifest import read_manifest
from epsdpo.train.preferences import trainer_arguments


def measure_policies(runs: Sequence[Run], epsilons: Sequence[float]) -> pd.DataFrame:
    """`measure_pairs` of each run's final policy on its held-out pairs, with a line of progress for each run.

    Returns:
        Its columns and, before them, run (title) and method.
    """
    tables = []
    for number, run in enumerate(runs, start=1):
        table = _measure(run, epsilons)
        tables.append(table.assign(run=run.experiment.title, method=run.experiment.method))
        print(f"policy {number}/{len(runs)}: {run.experiment.title}, {table['pair_id'].nunique()} pairs", flush=True)
    return pd.concat(tables, ignore_index=True)


def measure_untrained(runs: Sequence[Run], epsilons: Sequence[float]) -> pd.DataFrame:
    """`measure_pairs` with the reference as its own policy, once per world: what the criterion decides about nothing.

    Exact arithmetic has no step there; whatever steps is made by rounding.
    """
    one_per_world = {world_seed(run.experiment): run for run in runs}
    return pd.concat([_measure(run, epsilons, trained=False) for run in one_per_world.values()], ignore_index=True)


def _measure(run: Run, epsilons: Sequence[float], trained: bool = True) -> pd.DataFrame:
    train_dir = run.directory / "train"
    parameters = read_manifest(train_dir)["parameters"]
    data = load_prepared(beside(run, parameters["data_dir"]))
    sft_dir = parameters.get("sft_dir", "")
    experiment = after_sft(run.experiment, sft_dir and beside(run, sft_dir))
    arguments = trainer_arguments(experiment, data, train_dir)
    source, revision = start_of(experiment)
    reference = load_frozen(experiment, source, arguments.device, revision=revision)
    policy = load_frozen(experiment, str(train_dir / MODEL_FOLDER), arguments.device) if trained else reference
    with precision_of(arguments):
        return measure_pairs(policy, reference, measured_pairs(data, PAIRS), arguments.max_length, epsilons)


def beside(run: Run, folder: str) -> Path:
    """A folder that a run's stages were given; the one in its batch folder, which may have been moved as a whole."""
    beside = run.directory.parent / Path(folder).name
    return beside if beside.is_dir() else resolve_path(folder)
