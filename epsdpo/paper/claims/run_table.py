"""One row per run of a batch: its recipe, its world, its settings, and the measures that claims can be about.

They are read from what the stages of each run wrote. Bounds of ε, which need models, and times of a step, which are a
benchmark's, are not among them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.keys import setting_of
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.methods.record import incompleteness, read_pairs
from epsdpo.plots.looks import family_of
from epsdpo.report.collect import origin_of
from epsdpo.runs.layout import SUMMARY, experiments_in
from epsdpo.runs.manifest import read_manifest
from epsdpo.trajectory.summary import DECISIONS, summarise

WITHIN_TRAINING = "checkpoints.csv"  # of 04_evaluate, where checkpoints were evaluated

_EVALUATED = (
    "win_rate",
    "length_controlled_win_rate",
    "forward_kl_per_response",
    "reverse_kl_per_response",
    "policy_gold",
    "reference_gold",
    "policy_tokens",
    "reference_tokens",
)


def finished_runs(run_dir: Path, recipes: Iterable[str]) -> dict[str, tuple[Path, Experiment]]:
    """Name -> folder and experiment of the runs of these recipes that are trained and evaluated.

    Raises:
        ConfigError: if there is none yet.
    """
    wanted = set(recipes)
    runs = {}
    for name, experiment in experiments_in(run_dir).items():
        folder = run_dir / name
        recipe, world = recipe_and_world(name)
        finished = all(read_manifest(folder / stage) is not None for stage in ("train", "evaluate"))
        if recipe in wanted and world is not None and finished:
            runs[name] = (folder, experiment)
    if not runs:
        raise ConfigError(
            f"{run_dir} holds no finished run, trained and evaluated, of a recipe of its claims. Give its command "
            "again, e.g. make paper-mini, or name a folder that has one"
        )
    return runs


def measure_runs(runs: dict[str, tuple[Path, Experiment]], tell: Callable[[str], None] = print) -> pd.DataFrame:
    """The measures of each run; NaN for what a run does not have.

    Args:
        runs: of `finished_runs`.
        tell: is given a line of progress now and then.

    Returns:
        One row per run: name, recipe, world, title (without its world), family, method, beta,
        epsilon, epsilon_step, criterion_dtype, label_temperature (settings), the columns of `summarise` with
        shares in percent, and all of `MEASURES` but for bounds and times.
    """
    rows = []
    for count, (name, (folder, experiment)) in enumerate(runs.items(), start=1):
        rows.append({"name": name, **_settings(name, experiment), **_measures(folder)})
        if count % 50 == 0 or count == len(runs):
            tell(f"{count}/{len(runs)} runs read")
    return pd.DataFrame(rows)


def first_training(runs: dict[str, tuple[Path, Experiment]]) -> str:
    """When the first training of these runs began (UTC), by its manifest; "" without runs."""
    return min((read_manifest(folder / "train")["started"] for folder, _ in runs.values()), default="")


def provenance(runs: Mapping[str, tuple[Path, Experiment]]) -> pd.DataFrame:
    """What the trainings came from, one row per commit, package versions and machine: how many runs, and the last."""
    origins = pd.DataFrame([origin_of(folder / "train") for folder, _ in runs.values()])
    if origins.empty:
        return origins
    alike = [column for column in origins if column != "finished (UTC)"]
    return origins.groupby(alike, as_index=False).agg(
        **{"runs": ("commit", "size"), "last finished (UTC)": ("finished (UTC)", "max")}
    )


def _settings(name: str, experiment: Experiment) -> dict[str, Any]:
    recipe, world = recipe_and_world(name)
    settings = {key: setting_of(experiment, key) for key in ("beta", "epsilon", "epsilon_step", "criterion_dtype")}
    if settings["epsilon_step"] is None:  # as the trainer takes it
        settings["epsilon_step"] = settings["epsilon"]
    return {
        "recipe": recipe,
        "world": world,
        "title": experiment.title.removesuffix(f", seed={world}"),
        "family": family_of(experiment),
        "method": experiment.method,
        **settings,
        "label_temperature": experiment.data.world.label_temperature,
    }


def _measures(folder: Path) -> dict[str, float]:
    if problem := incompleteness(folder / "train"):
        raise ConfigError(f"{folder / 'train'}: {problem} No claim can be tested on it; train it again")
    summary = json.loads((folder / "evaluate" / SUMMARY).read_text(encoding="utf-8"))
    summary.setdefault("length_controlled_win_rate", math.nan)  # where lengths do not allow for one
    trajectory = summarise(folder / "train")
    for decision in DECISIONS:
        trajectory[decision] *= 100.0
    measures = {**trajectory, **{name: summary[name] for name in _EVALUATED}}
    measures["beta_travel"] = trajectory["beta_final"] / trajectory["beta_initial"]
    measures["gold_gain"] = summary["policy_gold"] - summary["reference_gold"]
    measures["length_effect"] = measures["length_controlled_win_rate"] - measures["win_rate"]
    measures["tightened_margin"] = tightened_margin(read_pairs(folder / "train"))
    within = folder / "evaluate" / WITHIN_TRAINING
    if within.exists():
        checkpoints = pd.read_csv(within)
        measures["first_win_rate"] = float(checkpoints["win_rate"].iloc[0])
        from_the_middle = (checkpoints["step"] - trajectory["steps"] / 2).abs()
        nearest = checkpoints[from_the_middle == from_the_middle.min()].iloc[-1]  # of two as near the later one
        measures["middle_forward_kl"] = float(nearest["forward_kl_per_response"])
    return measures


def tightened_margin(pairs: pd.DataFrame) -> float:
    """Mean implicit reward margin of pairs that chose β⁺ less that of all others, in the second half of training.

    In a run of one epoch each pair is met once, before it is trained on, so that these are margins of unseen pairs.
    NaN for a method without decisions, or if either group is empty.
    """
    later = second_half(pairs)
    tightened = later["decision"] == DECISIONS["tightened"]
    return float(later.loc[tightened, "reward_margin"].mean() - later.loc[~tightened, "reward_margin"].mean())


def second_half(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of the second half of training, by optimiser steps."""
    return pairs[pairs["step"] > pairs["step"].max() / 2]
