"""Evaluation of one run: both models answer the prompts, the judge compares, and the numbers are written.

The order of the work, and the files that it leaves.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.data.prompts import Prompts, read_prompts
from epsdpo.evaluation.calibration import judge_again
from epsdpo.evaluation.generate import answer_prompts
from epsdpo.evaluation.judge import LazyJudge, check_given_responses, judge_responses
from epsdpo.evaluation.judged_before import read_published
from epsdpo.evaluation.scores.annotations import write_annotations
from epsdpo.evaluation.scores.clusters import counted, distinct
from epsdpo.evaluation.scores.numbers import (
    alpaca_eval_numbers,
    divergence_numbers,
    gold_numbers,
    length_numbers,
    preference_numbers,
)
from epsdpo.experiment import WORLD, Experiment
from epsdpo.files import writable, written_whole
from epsdpo.runs.layout import ANNOTATIONS, MODEL_FOLDER, RESPONSES, SUMMARY
from epsdpo.world.language import follows_every_rule, gold_score

logger = logging.getLogger(__name__)

CALIBRATION = "calibration.parquet"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote.

    Attributes:
        directory: holds responses.parquet and summary.json, with a judge annotations.json, with published judgements
            calibration.parquet.
        responses: one row per prompt: the columns of both models' answers; on the embedded world, for `policy_`
            and `reference_` each, gold and correct; with a judge those of its comparisons.
        summary: the numbers of the table, flat; each interval is a pair of keys `<measure>_low`, `<measure>_high`.
            `judge` is None where there is none: then there are no preferences and no win rates.
        calibration: instruction, official and judged preference of each published comparison; None without any.
    """

    directory: Path
    responses: pd.DataFrame
    summary: dict[str, Any]
    calibration: pd.DataFrame | None = None


def evaluate(
    experiment: Experiment,
    data_dir: Path,
    train_dir: Path,
    output_dir: Path,
    answers_dir: Path | None = None,
    policy: str = MODEL_FOLDER,
) -> Evaluation:
    """Compare the policy in `train_dir` with the reference it started from, or with the responses prompts bring along.

    `summary.json` is written last: a folder without it is unfinished. What models and judge answered is kept as it
    comes, each under all that decides it: the same call, or another for the same run, asks for nothing twice.

    Args:
        experiment: its `evaluate` section says how; its seed makes sampling and intervals repeatable.
        data_dir: prepared data.
        train_dir: holds the policy.
        output_dir: made if it is missing.
        answers_dir: keeps generated.jsonl and judgements.jsonl, for one evaluation at a time; by default `output_dir`.
        policy: folder of `train_dir` with the policy's weights: the trained model, or a checkpoint.

    Raises:
        ValueError: if the experiment has no evaluate section, there are fewer than two distinct prompts, or prompts
            bring no response along to compare with.
        FileNotFoundError: if the prompts or the policy are missing.
        JudgeError: if the judge cannot be asked; before any work where that shows before.
    """
    settings = experiment.evaluate
    if settings is None:
        raise ValueError(f"experiment {experiment.name!r} has no `evaluate` section. Add one to its config")
    prompts = read_prompts(settings.prompts, Path(data_dir))
    of_the_world = settings.prompts.source == WORLD
    _check_prompts(prompts, of_the_world)
    check_given_responses(prompts, settings)
    policy_dir = Path(train_dir) / policy
    if not policy_dir.is_dir():
        raise FileNotFoundError(f"{policy_dir}: no trained policy; run the train stage first")
    output_dir = Path(output_dir)
    answers_dir = output_dir if answers_dir is None else Path(answers_dir)
    temperature = experiment.data.world.label_temperature
    judge = None if settings.judge is None else LazyJudge(settings.judge, temperature, answers_dir)
    published = None if settings.calibrate_with is None else read_published(settings.calibrate_with, experiment.seed)
    for folder in (output_dir, answers_dir):
        folder.mkdir(parents=True, exist_ok=True)
    (output_dir / SUMMARY).unlink(missing_ok=True)

    answers = answer_prompts(experiment, prompts, Path(data_dir), policy_dir, answers_dir)
    responses, samples, seed = answers.responses, settings.bootstrap_samples, experiment.seed
    summary: dict[str, Any] = {
        "run": experiment.name,
        "title": experiment.title,
        "method": experiment.method,
        "judge": None,
        "n_total": len(responses),
        "n_distinct": distinct(responses["instruction"]),
    }
    if of_the_world:
        _add_gold(responses)
    if judge is not None:
        judged = judge_responses(responses, experiment, judge)
        responses[judged.preferences.columns] = judged.preferences
        write_annotations(output_dir / ANNOTATIONS, judged.annotations)
        summary |= judged.numbers | preference_numbers(responses, settings.against, samples, seed)
        if "win_rate" in summary:
            path = output_dir / ANNOTATIONS
            summary |= alpaca_eval_numbers(path, responses["instruction"], settings.against, samples)
    logger.info("bootstrapping %d resamples of the prompts", samples)
    summary |= gold_numbers(responses, samples, seed) if of_the_world else {}
    summary |= {
        **divergence_numbers(responses, samples, seed),
        **length_numbers(responses),
        **answers.provenance,
        "seed": seed,
        "settings": settings.model_dump(),
    }
    calibration = None
    if published is not None:
        calibration, summary["calibration"] = judge_again(published, judge, samples, seed)
        with written_whole(output_dir / CALIBRATION) as partial:
            calibration.to_parquet(partial, index=False)
    with written_whole(output_dir / RESPONSES) as partial:
        responses.to_parquet(partial, index=False)
    write_json(output_dir / SUMMARY, summary)
    return Evaluation(output_dir, responses, summary, calibration)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON; the file appears whole or not at all.

    Null stands for floats that are not numbers, U+FFFD for halves of characters.
    """
    text = json.dumps(_without_nan(writable(value)), ensure_ascii=False, indent=1, allow_nan=False)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _check_prompts(prompts: Prompts, of_the_world: bool) -> None:
    instructions = prompts.table["instruction"]
    if of_the_world:
        for instruction in instructions:
            gold_score(instruction, "")  # an instruction that cannot be scored is refused before models are loaded
    if distinct(instructions) < 2:
        raise ValueError(
            f"{prompts.report['source']} holds {counted(instructions)}; intervals need two distinct ones at least. "
            "Raise data.world.prompts, or evaluate.prompts.max_prompts"
        )


def _add_gold(responses: pd.DataFrame) -> None:
    """Add, for both sides, the gold reward and whether every rule is followed."""
    for side in ("policy", "reference"):
        answered = list(zip(responses["instruction"], responses[f"{side}_response"], strict=True))
        responses[f"{side}_gold"] = [gold_score(instruction, text) for instruction, text in answered]
        responses[f"{side}_correct"] = [follows_every_rule(instruction, text) for instruction, text in answered]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
