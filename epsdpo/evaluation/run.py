"""Evaluation of one run: both models answer the prompts, the judge compares, and the numbers are written.

This module knows the order of the work and the files it leaves. How responses come about and how far the models are
apart is left to `answers`, how responses compare to `judge` and `winrate`; what a notebook shows of it to `tables` and
`epsdpo.plots`.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.evaluation.answers import answer_prompts
from epsdpo.evaluation.judge import GOLD_JUDGE, annotate, follows_every_rule, gold_judge
from epsdpo.evaluation.winrate import average_length, bootstrap_interval, length_controlled_win_rate, win_rate
from epsdpo.experiment import WORLD, Experiment
from epsdpo.files import written_whole
from epsdpo.generation.prompts import Prompts, read_prompts

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
ANNOTATIONS = "annotations.json"
RESPONSES = "responses.parquet"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote.

    Attributes:
        directory: holds generated.jsonl, responses.parquet and summary.json, and annotations.json if there is a judge.
        responses: one row per prompt: those of `epsdpo.evaluation.answers`, and from the embedded world's judge, for
            `policy_` and `reference_` each, gold and correct, then preference.
        summary: the numbers of the table, flat; each interval is a pair of keys `<measure>_low`, `<measure>_high`.
            `judge` is None where there is none: then there are no preferences and no win rates.
    """

    directory: Path
    responses: pd.DataFrame
    summary: dict[str, Any]


def evaluate(experiment: Experiment, data_dir: Path, train_dir: Path, output_dir: Path) -> Evaluation:
    """Compare the policy in `train_dir` with the reference it started from.

    Prompts of the embedded world are judged by its gold reward. Other prompts have no judge yet: their responses,
    lengths and divergences are measured. `summary.json` is written last: a folder without it is unfinished, and the
    same call goes on from the responses that it holds.

    Args:
        experiment: its `evaluate` section says how; its seed makes sampling and intervals repeatable.
        data_dir: prepared data.
        train_dir: holds the trained policy in `model/`.
        output_dir: made if it is missing.

    Raises:
        ValueError: if the experiment has no evaluate section, or there are fewer than two prompts.
        FileNotFoundError: if the prompts or the policy are missing.
    """
    settings = experiment.evaluate
    if settings is None:
        raise ValueError(f"experiment {experiment.name!r} has no `evaluate` section. Add one to its config")
    judged = settings.prompts.source == WORLD
    prompts = read_prompts(settings.prompts, Path(data_dir))
    _check_prompts(prompts, judged)
    policy_dir = Path(train_dir) / "model"
    if not policy_dir.is_dir():
        raise FileNotFoundError(f"{policy_dir}: no trained policy; run the train stage first")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / SUMMARY).unlink(missing_ok=True)

    answers = answer_prompts(experiment, prompts, Path(data_dir), policy_dir, output_dir)
    responses, samples = answers.responses, settings.bootstrap_samples
    summary = {
        "run": experiment.name,
        "title": experiment.title,
        "method": experiment.method,
        "judge": None,
        "n_total": len(responses),
    }
    if judged:
        temperature = experiment.data.world.label_temperature
        summary["judge"] = f"{GOLD_JUDGE} (the embedded world's own reward, label temperature {temperature:g})"
        write_json(output_dir / ANNOTATIONS, _judge(responses, experiment.name, temperature))
    logger.info("bootstrapping %d resamples of the prompts", samples)
    if judged:
        summary |= _preference_numbers(responses, samples, experiment.seed)
        summary |= _gold_numbers(responses, samples, experiment.seed)
    summary |= {
        **_divergence_numbers(responses, samples, experiment.seed),
        **_length_numbers(responses),
        **answers.provenance,
        "seed": experiment.seed,
        "settings": settings.model_dump(),
    }
    responses.to_parquet(output_dir / RESPONSES, index=False)
    write_json(output_dir / SUMMARY, summary)
    return Evaluation(output_dir, responses, summary)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, null standing for floats that are not numbers; the file appears whole or not at all."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, indent=1, allow_nan=False)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _check_prompts(prompts: Prompts, judged: bool) -> None:
    if len(prompts.table) < 2:
        raise ValueError(
            f"{prompts.report['source']} holds {len(prompts.table)} prompts; intervals need two at least. Raise "
            "data.world.prompts, or evaluate.prompts.max_prompts"
        )
    if judged:
        for instruction in prompts.table["instruction"]:
            gold_judge(instruction, "")  # an instruction that cannot be judged is refused before models are loaded


def _judge(responses: pd.DataFrame, run: str, temperature: float) -> list[dict[str, Any]]:
    """Add the gold judge's columns to `responses`, and return its annotations."""
    for side in ("policy", "reference"):
        answered = list(zip(responses["instruction"], responses[f"{side}_response"], strict=True))
        responses[f"{side}_gold"] = [gold_judge(instruction, text) for instruction, text in answered]
        responses[f"{side}_correct"] = [follows_every_rule(instruction, text) for instruction, text in answered]
    annotations = annotate(responses, run, temperature)
    responses["preference"] = [row["preference"] for row in annotations]
    return annotations


def _preference_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    """Raw and length-controlled win rate in percent, with their intervals."""
    raw = win_rate(responses["preference"])
    interval = bootstrap_interval(100.0 * (responses["preference"] - 1.0), samples, seed)
    controlled = length_controlled_win_rate(
        responses["preference"],
        responses["policy_response"].str.len(),
        responses["reference_response"].str.len(),
        samples,
        seed,
    )
    return {
        "n_total": raw.n_total,
        "n_scored": raw.n_scored,
        "win_rate": raw.win_rate,
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "standard_error": raw.standard_error,
        "discrete_win_rate": raw.discrete_win_rate,
        "length_control": "length-only",
        "length_controlled_win_rate": controlled.win_rate,
        "length_controlled_win_rate_low": controlled.interval.low,
        "length_controlled_win_rate_high": controlled.interval.high,
        "length_effect": controlled.length_effect,
    }


def _divergence_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, float]:
    """Both divergences in nats, per response and per token, with their intervals.

    `reverse_kl_*` is KL(π‖π_ref) on the policy's responses, what the objective holds in check; `forward_kl_*` is
    KL(π_ref‖π) on the reference's, the one of the paper's Figures 3 and 4b. `kl_*` is the reverse one's older name.
    """
    numbers: dict[str, float] = {}
    for direction, column, side in (("reverse", "kl", "policy"), ("forward", "forward_kl", "reference")):
        tokens = responses[f"{side}_tokens"]
        per_token = bootstrap_interval(responses[column], samples, seed, units=tokens)
        numbers |= {
            **_mean_with_interval(f"{direction}_kl_per_response", responses[column], samples, seed),
            f"{direction}_kl_per_token": float(responses[column].sum() / tokens.sum()),
            f"{direction}_kl_per_token_low": per_token.low,
            f"{direction}_kl_per_token_high": per_token.high,
        }
    return {key.removeprefix("reverse_"): value for key, value in numbers.items() if "reverse" in key} | numbers


def _gold_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, float]:
    """Gold rewards and shares of right responses of both sides, each mean with its interval."""
    numbers: dict[str, float] = {}
    for side in ("policy", "reference"):
        numbers |= _mean_with_interval(f"{side}_gold", responses[f"{side}_gold"], samples, seed)
        numbers |= _mean_with_interval(f"{side}_correct", responses[f"{side}_correct"], samples, seed)
    return numbers


def _length_numbers(responses: pd.DataFrame) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for side in ("policy", "reference"):
        numbers[f"{side}_avg_length"] = average_length(responses[f"{side}_response"])
        numbers[f"{side}_tokens"] = float(responses[f"{side}_tokens"].mean())
        numbers[f"{side}_finished"] = float(responses[f"{side}_finished"].mean())
    return numbers


def _mean_with_interval(name: str, values: pd.Series, samples: int, seed: int) -> dict[str, float]:
    interval = bootstrap_interval(values, samples, seed)
    return {name: float(values.mean()), f"{name}_low": interval.low, f"{name}_high": interval.high}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
