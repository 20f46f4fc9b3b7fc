"""Evaluation of one run: both models answer the held-out prompts, the gold judge compares, and the numbers are written.

This module knows the order of the work and the files it leaves. How responses are made, judged, counted and measured
is left to `generate`, `judge`, `winrate` and `kl`; what a notebook shows of it to `tables` and `epsdpo.plots`.

Imports of torch and transformers, and of what imports them, are late: scoring judgements needs neither.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from epsdpo.evaluation.winrate import average_length, bootstrap_interval, length_controlled_win_rate, win_rate
from epsdpo.experiment import Experiment
from epsdpo.files import written_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from epsdpo.evaluation.generate import Response

logger = logging.getLogger(__name__)

SUMMARY = "summary.json"
ANNOTATIONS = "annotations.json"
RESPONSES = "responses.parquet"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` wrote.

    Attributes:
        directory: holds annotations.json, responses.parquet and summary.json.
        responses: one row per prompt: prompt_id, instruction, task, then for `policy_` and `reference_` each response,
            gold, correct, tokens and finished, then preference and kl (nats along the policy's response).
        summary: the numbers of the table, flat; each interval is a pair of keys `<measure>_low`, `<measure>_high`.
    """

    directory: Path
    responses: pd.DataFrame
    summary: dict[str, Any]


def evaluate(experiment: Experiment, data_dir: Path, train_dir: Path, output_dir: Path) -> Evaluation:
    """Compare the policy in `train_dir` with the reference it started from.

    Both models run in float32 on the GPU if there is one. They sample from different streams of random numbers, so
    that their responses are independent; the reference's responses are the same for every run with this seed.
    `summary.json` is written last: a folder without it is unfinished.

    Args:
        experiment: its `evaluate` section says how; its seed makes sampling and intervals repeatable.
        data_dir: prepared data with prompts.parquet.
        train_dir: holds the trained policy in `model/`.
        output_dir: made if it is missing.

    Raises:
        ValueError: if the experiment has no evaluate section or there are fewer than two prompts.
        FileNotFoundError: if the prompts or the policy are missing.
    """
    from epsdpo.evaluation.generate import generate_responses
    from epsdpo.evaluation.judge import GOLD_JUDGE, annotate
    from epsdpo.evaluation.kl import sequence_kl
    from epsdpo.models import load_tokenizer, reference_source

    settings = experiment.evaluate
    if settings is None:
        raise ValueError(f"experiment {experiment.name!r} has no `evaluate` section. Add one to its config")
    prompts = _read_prompts(Path(data_dir))
    policy_dir = Path(train_dir) / "model"
    if not policy_dir.is_dir():
        raise FileNotFoundError(f"{policy_dir}: no trained policy; run the train stage first")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / SUMMARY).unlink(missing_ok=True)

    tokenizer = load_tokenizer(experiment.model, experiment.data)
    reference_path, revision = reference_source(experiment.model, experiment.data)
    policy, reference = _load(policy_dir, None), _load(reference_path, revision)
    prompt_ids = [list(ids) for ids in prompts["prompt_ids"]]
    started = time.monotonic()
    logger.info("policy answers %d prompts", len(prompts))
    policy_responses = generate_responses(policy, tokenizer, prompt_ids, settings, experiment.seed)
    logger.info("reference answers %d prompts", len(prompts))
    reference_responses = generate_responses(reference, tokenizer, prompt_ids, settings, experiment.seed + 1)
    generated = time.monotonic()
    sequences = [(prompt, answer.token_ids) for prompt, answer in zip(prompt_ids, policy_responses, strict=True)]
    divergence = sequence_kl(policy, reference, sequences, settings.batch_size)
    measured = time.monotonic()

    responses = prompts[["prompt_id", "instruction", "task"]].copy()
    _add_answers(responses, "policy", policy_responses)
    _add_answers(responses, "reference", reference_responses)
    temperature = experiment.data.world.label_temperature
    annotations = annotate(responses, experiment.name, temperature)
    responses["preference"] = [row["preference"] for row in annotations]
    responses["kl"] = divergence.nats
    logger.info("bootstrapping %d resamples of the prompts", settings.bootstrap_samples)
    summary = {
        "run": experiment.name,
        "title": experiment.title,
        "method": experiment.method,
        "judge": f"{GOLD_JUDGE} (the embedded world's own reward, label temperature {temperature:g})",
        **_preference_numbers(responses, settings.bootstrap_samples, experiment.seed),
        **_response_numbers(responses, settings.bootstrap_samples, experiment.seed),
        "sampling_seconds": generated - started,
        "kl_seconds": measured - generated,
        "seed": experiment.seed,
        "settings": settings.model_dump(),
        "policy": str(policy_dir),
        "reference": str(reference_path),
        "reference_revision": revision,
    }
    write_json(output_dir / ANNOTATIONS, annotations)
    responses.to_parquet(output_dir / RESPONSES, index=False)
    write_json(output_dir / SUMMARY, summary)
    return Evaluation(output_dir, responses, summary)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON, null standing for floats that are not numbers; the file appears whole or not at all."""
    text = json.dumps(_without_nan(value), ensure_ascii=False, indent=1, allow_nan=False)
    with written_whole(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _read_prompts(data_dir: Path) -> pd.DataFrame:
    from epsdpo.evaluation.judge import gold_judge

    path = data_dir / "prompts.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no held-out prompts; run the prepare stage of this experiment first")
    prompts = pd.read_parquet(path)
    if len(prompts) < 2:
        raise ValueError(f"{path} holds {len(prompts)} prompts; intervals need two at least. Raise data.world.prompts")
    for instruction in prompts["instruction"]:
        gold_judge(instruction, "")  # an instruction that cannot be judged is refused before models are loaded
    return prompts


def _load(path: str | Path, revision: str | None) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _add_answers(responses: pd.DataFrame, side: str, answers: list[Response]) -> None:
    """Columns <side>_response, _gold, _correct, _tokens and _finished."""
    from epsdpo.evaluation.judge import follows_every_rule, gold_judge

    texts = [answer.text for answer in answers]
    judged = list(zip(responses["instruction"], texts, strict=True))
    responses[f"{side}_response"] = texts
    responses[f"{side}_gold"] = [gold_judge(instruction, text) for instruction, text in judged]
    responses[f"{side}_correct"] = [follows_every_rule(instruction, text) for instruction, text in judged]
    responses[f"{side}_tokens"] = [len(answer.token_ids) for answer in answers]
    responses[f"{side}_finished"] = [answer.finished for answer in answers]


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


def _response_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    """Divergence, gold rewards and lengths, each mean with its interval."""
    tokens = responses["policy_tokens"]
    numbers = _mean_with_interval("kl_per_response", responses["kl"], samples, seed)
    per_token = bootstrap_interval(responses["kl"], samples, seed, units=tokens)
    numbers |= {
        "kl_per_token": float(responses["kl"].sum() / tokens.sum()),
        "kl_per_token_low": per_token.low,
        "kl_per_token_high": per_token.high,
    }
    for side in ("policy", "reference"):
        numbers |= _mean_with_interval(f"{side}_gold", responses[f"{side}_gold"], samples, seed)
        numbers |= _mean_with_interval(f"{side}_correct", responses[f"{side}_correct"], samples, seed)
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
