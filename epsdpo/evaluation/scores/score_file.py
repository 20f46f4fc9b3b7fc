"""What a file of judgements comes to: AlpacaEval's numbers and their intervals, as `python -m epsdpo winrate` prints.

Which numbers belong together, and when there is no length-controlled one.
"""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from epsdpo.evaluation.scores.alpaca_eval_prompts import N_PROMPTS, prompt_number
from epsdpo.evaluation.scores.annotations import Annotations, InputError, read_annotations
from epsdpo.evaluation.scores.clusters import distinct
from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.evaluation.scores.length_control import Coefficients, GamedRows, length_control
from epsdpo.evaluation.scores.length_control_data import Difficulties, hub_file, read_difficulties, read_gamed
from epsdpo.evaluation.scores.winrate import LENGTHS_ALIKE, length_controlled_win_rate, win_rate

logger = logging.getLogger(__name__)

ALPACA_EVAL_2 = "AlpacaEval 2"
BOOTSTRAP_SAMPLES = 1000
LEVEL = 0.95
_ENDS = ("", "_low", "_high")
_TOO_FEW = "it needs two scored prompts at least"


@dataclasses.dataclass(frozen=True)
class Basis:
    """What length control stands on."""

    gamed: GamedRows
    difficulties: Difficulties


def score_file(
    path: str | Path,
    gamed_path: str | Path | None = None,
    difficulty_path: str | Path | None = None,
    c: float | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, Any]:
    """Score a file of judgements; see `score` for the numbers.

    Without `gamed_path` the published rows are taken from huggingface_hub's cache or downloaded, for AlpacaEval's own
    prompts only; without `difficulty_path` the difficulties are those in the file of gamed rows. Where that cannot be
    had, or a prompt has no difficulty, there is no length-controlled win rate, and a warning is logged.

    Raises:
        InputError: if a file is not what it should be, `c` is not positive, or no prompt is scored.
    """
    if c is not None and not 0.0 < c < math.inf:
        raise InputError(f"C is {c:g}; it is the inverse strength of a penalty, a positive number such as 2.78")
    annotations = read_annotations(path)
    try:
        basis = None if annotations.of_itself else _basis(annotations, gamed_path, difficulty_path)
        reason = ""
    except _NoBasisError as error:
        basis, reason = None, str(error)
    return score(annotations, basis, c, samples, reason=reason)


def score(
    annotations: Annotations,
    basis: Basis | None,
    c: float | None = None,
    samples: int = BOOTSTRAP_SAMPLES,
    seed: int = 0,
    reason: str = "",
) -> dict[str, Any]:
    """The numbers of one model against one reference; the order of the file's rows changes none of them.

    Args:
        annotations: judgements.
        basis: of length control; without it there is none.
        c: as for `length_control`.
        samples: resamples of the prompts for each interval, the same ones for each.
        seed: of the resamples.
        reason: why there is no basis.

    Returns:
        A flat dictionary ready for strict JSON; docs/scores.md says what each key is. A number that does not exist is
        None. The interval of a rate is a pair of keys that end in `_low` and `_high`.

    Raises:
        InputError: if no prompt is scored.
    """
    prompts = _in_order(annotations.prompts)
    n_total, n_scored = len(prompts), int(prompts["preference"].notna().sum())
    if n_scored == 0:
        raise InputError(f"{annotations.path}: none of its {n_total} prompts has a preference. Judge them again")
    if n_scored < n_total:
        logger.warning("%s: %d of %d prompts have no preference", annotations.path, n_total - n_scored, n_total)
    raw = win_rate(prompts["preference"], prompts["instruction"])
    judged = prompts.dropna(subset=["preference"])
    wins = 100.0 * (judged["preference"] - 1.0)
    interval = bootstrap_interval(wins, samples, seed, LEVEL, prompts=judged["instruction"])
    numbers = {
        "model": annotations.model,
        "reference": annotations.reference,
        "annotator": annotations.annotator,
        "n_total": n_total,
        "n_absent": _absent(prompts),
        "n_distinct": distinct(prompts["instruction"]),
        "n_scored": n_scored,
        "n_failed": n_total - n_scored,
        "n_wins": raw.n_wins,
        "n_wins_base": raw.n_losses,
        "n_draws": raw.n_draws,
        "win_rate": raw.win_rate,
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "standard_error": raw.standard_error,
        "discrete_win_rate": raw.discrete_win_rate,
        "avg_length": int(prompts["model_length"].mean()),
        "reference_avg_length": int(prompts["reference_length"].mean()),
        **_length_controls(annotations, prompts, basis, c, samples, seed, reason),
        "interval_level": LEVEL,
        "bootstrap_samples": samples,
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in numbers.items()}


class _NoBasisError(Exception):
    """There is nothing to control length by; the message says why."""


def _basis(annotations: Annotations, gamed_path: str | Path | None, difficulty_path: str | Path | None) -> Basis:
    if gamed_path is None:
        foreign = [text for text in annotations.prompts["instruction"] if prompt_number(text) is None]
        if foreign and difficulty_path is None:
            raise _NoBasisError(
                f"{len(foreign)} of {len(annotations.prompts)} prompts are not AlpacaEval's: they have no difficulty"
            )
        try:
            gamed_path = hub_file()
        except OSError as error:
            raise _NoBasisError(f"the published gamed rows cannot be had ({error}); name a copy by --gamed") from error
    return Basis(read_gamed(gamed_path), read_difficulties(difficulty_path or gamed_path))


def _in_order(prompts: pd.DataFrame) -> pd.DataFrame:
    """AlpacaEval's prompts in their own order, which cross-validation needs, then all others by their text."""
    numbers = [prompt_number(instruction) for instruction in prompts["instruction"]]
    keyed = prompts.assign(number=[math.inf if number is None else number for number in numbers])
    return keyed.sort_values(["number", "instruction"], ignore_index=True).drop(columns="number")


def _absent(prompts: pd.DataFrame) -> int | None:
    """How many of AlpacaEval's prompts the file has no row of; None where it has rows of others."""
    numbers = prompts["instruction"].map(prompt_number)
    return None if numbers.isna().any() else N_PROMPTS - numbers.nunique()


def _length_controls(
    annotations: Annotations,
    prompts: pd.DataFrame,
    basis: Basis | None,
    c: float | None,
    samples: int,
    seed: int,
    reason: str,
) -> dict[str, Any]:
    """AlpacaEval 2's and the length-only one; of a model against itself, both as AlpacaEval's package has its own."""
    if not annotations.of_itself:
        return {
            **_length_controlled(annotations, prompts, basis, c, samples, seed, reason),
            **_length_only(prompts, samples, seed),
        }
    logger.warning(
        "%s: generator_1 and generator_2 are both %r, one model against itself: its length-controlled win rate is 50 "
        "by construction. If they are two models, give them two names",
        *(annotations.path, annotations.model),
    )
    rates = [f"{rate}{end}" for rate in ("length_controlled_winrate", "length_only_winrate") for end in _ENDS]
    return {
        "length_control": ALPACA_EVAL_2,
        **dict.fromkeys(rates, 50.0),
        "length_only_missing": None,
        "length_controlled_winrate_by_row": None,
        "lc_standard_error": 0.0,
        "C": None,
        "C_from": "construction",
        "coefficients": dataclasses.asdict(Coefficients(0.0, 0.0, 0.0)),
    }


def _length_controlled(
    annotations: Annotations,
    prompts: pd.DataFrame,
    basis: Basis | None,
    c: float | None,
    samples: int,
    seed: int,
    reason: str,
) -> dict[str, Any]:
    """AlpacaEval 2's numbers, all None and with the reason where there are none."""
    if basis is not None:
        difficulties = np.array([basis.difficulties.of(instruction) for instruction in prompts["instruction"]])
        reason = _why_not(prompts, difficulties)
    if reason:
        logger.warning("%s: no length-controlled win rate: %s", annotations.path, reason)
        rates = [f"length_controlled_winrate{end}" for end in _ENDS]
        nothing = [*rates, "length_controlled_winrate_by_row", "lc_standard_error", "C", "C_from", "coefficients"]
        return {"length_control": f"none: {reason}", **dict.fromkeys(nothing)}
    judged = prompts[["preference", "model_length", "reference_length"]]
    controlled = length_control(
        *judged.to_numpy().T, difficulties, basis.gamed, samples, seed, c, LEVEL, prompts["instruction"]
    )
    return {
        "length_control": ALPACA_EVAL_2,
        "length_controlled_winrate": controlled.win_rate,
        "length_controlled_winrate_low": controlled.interval.low,
        "length_controlled_winrate_high": controlled.interval.high,
        "length_controlled_winrate_by_row": _by_row(annotations, judged, basis, c, controlled.win_rate),
        "lc_standard_error": controlled.standard_error,
        "C": controlled.c,
        "C_from": "cross-validation" if c is None else "caller",
        "coefficients": dataclasses.asdict(controlled.coefficients),
    }


def _by_row(
    annotations: Annotations, judged: pd.DataFrame, basis: Basis, c: float | None, by_instruction: float
) -> float | None:
    """What AlpacaEval's package gives for a file that lacks some of its prompts; None for any other.

    It looks difficulties up by the number of a row, which is another prompt's from the first absent one on.
    """
    difficulties = basis.difficulties.of_first(len(judged))
    if not _absent(annotations.prompts) or np.isnan(difficulties).any():
        return None
    rate = length_control(*judged.to_numpy().T, difficulties, basis.gamed, 0, 0, c).win_rate
    logger.warning(
        "%s: incomplete: it has %d of AlpacaEval's %d prompts. Its length-controlled win rate is %.2f; the official "
        "code gives %.2f, since it joins difficulties by row, and from the first absent prompt on each row gets "
        "another prompt's",
        *(annotations.path, len(judged), N_PROMPTS, by_instruction, rate),
    )
    return rate


def _why_not(prompts: pd.DataFrame, difficulties: np.ndarray) -> str:
    unknown = prompts["instruction"][np.isnan(difficulties)]
    if len(unknown):
        return f"{len(unknown)} of {len(prompts)} prompts have no difficulty, the first is {unknown.iloc[0][:60]!r}"
    if prompts["preference"].count() < 2:
        return _TOO_FEW
    return ""


def _length_only(prompts: pd.DataFrame, samples: int, seed: int) -> dict[str, Any]:
    """The length-only model, under names that cannot be taken for AlpacaEval's."""
    if prompts["preference"].count() < 2:
        rates = dict.fromkeys(f"length_only_winrate{end}" for end in _ENDS)
        return {**rates, "length_only_missing": _TOO_FEW}
    result = length_controlled_win_rate(
        prompts["preference"],
        prompts["model_length"],
        prompts["reference_length"],
        samples,
        seed,
        LEVEL,
        prompts["instruction"],
    )
    return {
        "length_only_winrate": result.win_rate,
        "length_only_winrate_low": result.interval.low,
        "length_only_winrate_high": result.interval.high,
        "length_only_missing": LENGTHS_ALIKE if math.isnan(result.win_rate) else None,
    }
