"""The numbers of an evaluation: rates, rewards, divergences and lengths, flat, each mean with its interval.

A table of responses in, keys of `summary.json` out; an interval is a pair of keys `<measure>_low`, `<measure>_high`.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.evaluation.scores.alpaca_eval_prompts import prompt_number
from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.evaluation.scores.score_file import ALPACA_EVAL_2, score_file
from epsdpo.evaluation.scores.winrate import LENGTHS_ALIKE, average_length, length_controlled_win_rate, win_rate

LENGTH_ONLY = "length-only"


def preference_numbers(responses: pd.DataFrame, against: str, samples: int, seed: int) -> dict[str, Any]:
    """Raw and length-controlled win rate in percent over the judged responses; none if fewer than two prompts are
    judged.

    `length_control` says what the length-controlled one is: here length-only, see `length_controlled_win_rate`, or why
    there is none.

    Args:
        responses: columns instruction, preference, policy_response and that of the opponent, `<against>_response`.
        samples: resamples of the prompts behind each interval.
    """
    judged = responses.dropna(subset=["preference"])
    prompts = judged["instruction"]
    if distinct(prompts) < 2:
        return {}
    raw = win_rate(judged["preference"], prompts)
    interval = bootstrap_interval(100.0 * (judged["preference"] - 1.0), samples, seed, prompts=prompts)
    controlled = length_controlled_win_rate(
        judged["preference"],
        judged["policy_response"].str.len(),
        judged[f"{against}_response"].str.len(),
        samples,
        seed,
        prompts=prompts,
    )
    numbers = {
        "win_rate": raw.win_rate,
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "standard_error": raw.standard_error,
        "discrete_win_rate": raw.discrete_win_rate,
    }
    if math.isnan(controlled.win_rate):
        return {**numbers, "length_control": f"none: {LENGTHS_ALIKE}"}
    return {
        **numbers,
        "length_control": LENGTH_ONLY,
        "length_controlled_win_rate": controlled.win_rate,
        "length_controlled_win_rate_low": controlled.interval.low,
        "length_controlled_win_rate_high": controlled.interval.high,
        "length_effect": controlled.length_effect,
    }


def alpaca_eval_numbers(annotations: Path, instructions: pd.Series, against: str, samples: int) -> dict[str, Any]:
    """AlpacaEval 2's length-controlled win rate in place of the length-only one, which is kept beside it.

    Its difficulties belong to its own prompts and to the outputs that these bring along. For other prompts or another
    opponent there is nothing; where the published files cannot be had, `length_control_missing` says why.

    Args:
        annotations: the file that was written of the judgements.
    """
    if against != "given" or any(prompt_number(text) is None for text in instructions):
        return {}
    scored = score_file(annotations, samples=samples)
    if scored["length_control"] != ALPACA_EVAL_2:
        return {"length_control_missing": scored["length_control"].removeprefix("none: ")}
    ends, length_only = ("", "_low", "_high"), scored["length_only_winrate"] is not None
    return {
        "length_control": ALPACA_EVAL_2,
        **{f"length_controlled_win_rate{end}": scored[f"length_controlled_winrate{end}"] for end in ends},
        **{f"length_only_win_rate{end}": scored[f"length_only_winrate{end}"] for end in ends if length_only},
        **{key: scored[key] for key in ("lc_standard_error", "C", "C_from", "coefficients")},
    }


def divergence_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, float]:
    """Both divergences in nats, per response and per token.

    `reverse_kl_*` is KL(π‖π_ref) on the policy's responses, what the objective holds in check; `forward_kl_*` is
    KL(π_ref‖π) on the reference's, the one of the paper's Figures 3 and 4b.
    """
    numbers: dict[str, float] = {}
    for direction, side in (("reverse", "policy"), ("forward", "reference")):
        nats, tokens = responses[f"{direction}_kl"], responses[f"{side}_tokens"]
        per_token = bootstrap_interval(nats, samples, seed, units=tokens, prompts=responses["instruction"])
        numbers |= {
            **_mean_with_interval(f"{direction}_kl_per_response", nats, responses, samples, seed),
            f"{direction}_kl_per_token": float(nats.sum() / tokens.sum()),
            f"{direction}_kl_per_token_low": per_token.low,
            f"{direction}_kl_per_token_high": per_token.high,
        }
    return numbers


def gold_numbers(responses: pd.DataFrame, samples: int, seed: int) -> dict[str, float]:
    """Gold rewards and shares of right responses of both sides."""
    numbers: dict[str, float] = {}
    for side in ("policy", "reference"):
        numbers |= _mean_with_interval(f"{side}_gold", responses[f"{side}_gold"], responses, samples, seed)
        numbers |= _mean_with_interval(f"{side}_correct", responses[f"{side}_correct"], responses, samples, seed)
    return numbers


def length_numbers(responses: pd.DataFrame) -> dict[str, float]:
    """Mean length in characters and tokens, and the share of responses that came to their end, of each side."""
    numbers: dict[str, float] = {}
    for side in ("policy", "reference"):
        numbers[f"{side}_avg_length"] = average_length(responses[f"{side}_response"])
        numbers[f"{side}_tokens"] = float(responses[f"{side}_tokens"].mean())
        numbers[f"{side}_finished"] = float(responses[f"{side}_finished"].mean())
    return numbers


def _mean_with_interval(
    name: str, values: pd.Series, responses: pd.DataFrame, samples: int, seed: int
) -> dict[str, float]:
    interval = bootstrap_interval(values, samples, seed, prompts=responses["instruction"])
    return {name: float(values.mean()), f"{name}_low": interval.low, f"{name}_high": interval.high}
