"""Evaluated runs beside each other: one less another prompt by prompt, and runs that differ in their seed joined."""

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.annotations import read_annotations
from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.evaluation.scores.seeds import join_seeds
from epsdpo.report.collect import Run
from epsdpo.runs.layout import ANNOTATIONS, RESPONSES

_PAIR_COLUMNS = ["title", "baseline", "difference", "low", "high", "better_share", "prompts", "distinct"]


def with_win_rate(runs: Sequence[Run]) -> list[Run]:
    """The runs that a judge compared."""
    return [run for run in runs if run.evaluation is not None and "win_rate" in run.evaluation]


def head_to_head(runs: Sequence[Run], samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Win rate of each run less that of each before it, prompt by prompt, in percentage points.

    Two runs are compared on the prompts for which one judge compared both with one and the same response. So the
    difference is taken per prompt before it is bootstrapped; its interval is narrower than two separate ones suggest.

    Returns:
        One row per pair that shares two such prompts: title, baseline, difference, low, high (95 % interval),
        better_share (percent of the prompts on which the run did better, ties half), prompts, distinct (of these).
    """
    judged = with_win_rate(runs)
    preferences = [_preferences(run) for run in judged]
    rows = []
    for first, second in itertools.combinations(range(len(judged)), 2):
        if judged[first].evaluation["judge"] != judged[second].evaluation["judge"]:
            continue
        both = pd.concat([preferences[first], preferences[second]], axis=1, join="inner", keys=["baseline", "run"])
        both = both.dropna()
        prompts = both.index.get_level_values("instruction")
        if distinct(prompts) < 2:
            continue
        difference = 100.0 * (both["run"] - both["baseline"])
        interval = bootstrap_interval(difference, samples, seed, prompts=prompts)
        row = (
            judged[second].experiment.title,
            judged[first].experiment.title,
            difference.mean(),
            interval.low,
            interval.high,
            100.0 * float(np.mean((difference > 0.0) + 0.5 * (difference == 0.0))),
            len(both),
            distinct(prompts),
        )
        rows.append(dict(zip(_PAIR_COLUMNS, row, strict=True)))
    return pd.DataFrame(rows, columns=_PAIR_COLUMNS)


def _preferences(run: Run) -> pd.Series:
    """Preferences by prompt and the response that the policy's was compared with."""
    opponent = f"{run.evaluation['against']}_response"
    responses = pd.read_parquet(run.directory / "evaluate" / RESPONSES)
    return responses.set_index(["prompt_id", "instruction", opponent])["preference"].rename_axis(
        ["prompt_id", "instruction", "opponent"]
    )


def seeds_joined(runs: Sequence[Run], samples: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Runs of one recipe, equal but for name, title and seed, joined; see `join_seeds` for the intervals.

    Where the opponent is the reference, each run drew the reference's responses anew by its seed, so that the spread
    between seeds is that of training and of both draws.

    Returns:
        One row per recipe with two seeds at least: runs (titles), seeds, win_rate, low, high (other seeds and other
        prompts), deviation (between seeds, in points), prompts.
    """
    recipes: dict[str, dict[int, Run]] = {}
    for run in with_win_rate(runs):
        recipe = run.experiment.model_dump(exclude={"name", "title", "seed"})
        recipe = json.dumps([recipe, run.evaluation["judge"]], sort_keys=True, default=str)
        # One seed twice is one run twice, and would count as a spread of 0 between seeds.
        recipes.setdefault(recipe, {}).setdefault(run.experiment.seed, run)
    rows = []
    for by_seed in recipes.values():
        members = list(by_seed.values())
        if len(members) < 2:
            continue
        annotations = [read_annotations(run.directory / "evaluate" / ANNOTATIONS) for run in members]
        redrawn = members[0].evaluation["against"] == "reference"
        joined = join_seeds(annotations, samples, seed, reference_redrawn=redrawn)
        rows.append(
            {
                "runs": ", ".join(run.experiment.title for run in members),
                "seeds": ", ".join(str(run.experiment.seed) for run in members),
                "win_rate": joined.win_rate,
                "low": joined.interval.low,
                "high": joined.interval.high,
                "deviation": joined.deviation,
                "prompts": joined.n_prompts,
            }
        )
    return pd.DataFrame(rows, columns=["runs", "seeds", "win_rate", "low", "high", "deviation", "prompts"])
