"""Win rates in percent, by AlpacaEval 2's formulas for preferences in [1, 2]: raw, and at equal lengths."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from epsdpo.evaluation.scores.clusters import clusters_of
from epsdpo.evaluation.scores.intervals import Interval, bootstrap, standard_error

# Strength of the penalty on the two weights of the length-only model. On a hundred prompts it moves the rate by less
# than 0.01 points; it keeps the weights finite where one side wins every prompt or length alone predicts the winner.
_RIDGE = 1.0e-3

# How many times the prompts must outweigh the penalty in what they say of θ; else θ is the penalty's and not theirs.
_OUTWEIGHS = 10.0

LENGTHS_ALIKE = (
    "responses of one side are longer on every prompt, and by about as much, so that what length does cannot be told "
    "from what the model does"
)


@dataclass(frozen=True)
class WinRate:
    """AlpacaEval's summary of preferences.

    Attributes:
        n_total: prompts asked.
        n_scored: prompts with a preference; the others enter no rate. It is the sum of the next three.
        n_wins: preferences above 1.5.
        n_losses: preferences below 1.5.
        n_draws: preferences of exactly 1.5, or 0.
        win_rate: 100 · mean of (preference - 1).
        standard_error: 100 · standard deviation (n - 1) / √n, over conversations where prompts repeat; NaN for a
            single prompt.
        discrete_win_rate: a preference above 1.5 counts as one win, a draw as half of one.
    """

    n_total: int
    n_scored: int
    n_wins: int
    n_losses: int
    n_draws: int
    win_rate: float
    standard_error: float
    discrete_win_rate: float


@dataclass(frozen=True)
class LengthControlledWinRate:
    """Win rate at equal lengths under the length-only model; see `length_controlled_win_rate`.

    All are NaN where it is not determined, because of `LENGTHS_ALIKE`.

    Attributes:
        win_rate: 100 · σ(θ).
        interval: percentile bootstrap over prompts.
        length_effect: φ; negative where the judge favours the longer response.
        advantage: θ, the log-odds of a win at equal lengths.
    """

    win_rate: float
    interval: Interval
    length_effect: float
    advantage: float


def win_rate(preferences: Sequence[float | None], prompts: Sequence[str] | None = None) -> WinRate:
    """Summarise preferences in [1, 2]: 1 = the reference wins, 2 = the model wins, 1.5 or 0 = draw, missing = failed.

    Args:
        prompts: what each is about, as text; by default each is about another prompt.

    Raises:
        ValueError: if a preference is out of range or none is left.
    """
    wins = wins_of(preferences)
    scored = wins[~np.isnan(wins)]
    if scored.size == 0:
        raise ValueError(f"none of the {wins.size} preferences is scored: there is no win rate")
    if prompts is not None:
        prompts = [prompt for prompt, win in zip(prompts, wins, strict=True) if not np.isnan(win)]
    n_wins, n_draws = int((scored > 0.5).sum()), int((scored == 0.5).sum())
    return WinRate(
        n_total=wins.size,
        n_scored=scored.size,
        n_wins=n_wins,
        n_losses=scored.size - n_wins - n_draws,
        n_draws=n_draws,
        win_rate=100.0 * float(scored.mean()),
        standard_error=standard_error(scored, prompts, scale=100.0),
        discrete_win_rate=100.0 * (n_wins + 0.5 * n_draws) / scored.size,
    )


def length_controlled_win_rate(
    preferences: Sequence[float | None],
    model_lengths: Sequence[float],
    reference_lengths: Sequence[float],
    samples: int,
    seed: int,
    level: float = 0.95,
    prompts: Sequence[str] | None = None,
) -> LengthControlledWinRate:
    """What the win rate would be if both responses were equally long, by a logistic model of length alone.

    P(model wins) = σ(φ · tanh((reference length - model length) / std) + θ), with std (n - 1) that of the differences,
    not centred. AlpacaEval 2 adds a fixed difficulty per instruction, known for its own 805 prompts only: **the result
    is comparable with other length-only numbers and with no published length-controlled win rate.**

    Where both responses are equally long on all prompts, length cannot explain anything and the result is the raw win
    rate. Where one side's are longer by about as much on all, equal lengths were never seen: φ and θ come to the same
    there, and the result is NaN. Each bootstrap resample fits its own φ, θ and std; one that does not determine them is
    left out.

    Args:
        preferences: as for `win_rate`; prompts without one are left out of the fit.
        model_lengths: lengths of the model's responses, in characters as AlpacaEval counts them.
        reference_lengths: lengths of the reference's responses.
        samples: how many times the prompts are resampled.
        seed: of the resamples.
        level: coverage of the interval, in (0, 1).
        prompts: what each is about, as text; by default each is about another prompt.

    Raises:
        ValueError: if fewer than two prompts are scored.
    """
    wins = wins_of(preferences)
    scored = ~np.isnan(wins)
    if scored.sum() < 2:
        raise ValueError(f"length control needs two scored prompts at least; {scored.sum()} of {wins.size} are scored")
    differences = np.asarray(reference_lengths, dtype=np.float64) - np.asarray(model_lengths, dtype=np.float64)
    clusters = clusters_of(prompts, wins.size)[scored]
    wins, differences = wins[scored], differences[scored]
    length_effect, advantage = _fit_length_model(wins, differences)
    interval = bootstrap(
        lambda rows: _percent(_fit_length_model(wins[rows], differences[rows])[1]),
        np.unique(clusters, return_inverse=True)[1],
        samples,
        seed,
        level,
    )
    return LengthControlledWinRate(_percent(advantage), interval, length_effect, advantage)


def average_length(texts: Sequence[str]) -> int:
    """AlpacaEval's `avg_length`: mean number of characters, cut to a whole number."""
    return int(np.mean([len(text) for text in texts]))


def wins_of(preferences: Sequence[float | None]) -> np.ndarray:
    """Preferences (see `win_rate`) as wins in [0, 1]: a draw is 0.5, a missing one NaN.

    Raises:
        ValueError: if a preference is out of range.
    """
    preferences = np.array(preferences, dtype=np.float64)
    preferences[preferences == 0.0] = 1.5
    outside = preferences[(preferences < 1.0) | (preferences > 2.0)]
    if outside.size:
        raise ValueError(f"preference {outside[0]:g} is outside [1, 2]; a failed judgement must be None")
    return preferences - 1.0


def length_feature(differences: np.ndarray) -> np.ndarray:
    """AlpacaEval's tanh(length difference / std), std (n - 1) that of the known differences, not centred.

    Without spread it is the limit of a small one: 0 where lengths are equal, 1 or -1 where they differ.
    """
    known = differences[~np.isnan(differences)]
    spread = known.std(ddof=1) if np.ptp(known) > 0.0 else 0.0
    return np.tanh(differences / spread) if spread > 0.0 else np.sign(differences)


def _fit_length_model(wins: np.ndarray, differences: np.ndarray) -> tuple[float, float]:
    """(φ, θ) of the length-only model: each prompt enters as a win of weight y and a loss of weight 1 - y.

    NaN where the prompts do not determine θ: what they say of it, once φ is fitted, is n/4 times the part of the
    length feature's square that is not its mean's.
    """
    length = length_feature(differences)
    square = float(np.mean(length**2))
    own_part = 1.0 if square == 0.0 else length.var() / square
    if wins.size / 4.0 * own_part < _OUTWEIGHS * _RIDGE:
        return math.nan, math.nan
    features = np.column_stack([length, np.ones_like(length)])
    model = LogisticRegression(C=1.0 / _RIDGE, fit_intercept=False, solver="newton-cholesky")
    model.fit(
        np.concatenate([features, features]),
        np.repeat([1, 0], wins.size),
        sample_weight=np.concatenate([wins, 1.0 - wins]),
    )
    length_effect, advantage = model.coef_[0]
    return float(length_effect), float(advantage)


def _percent(log_odds: float) -> float:
    return 100.0 / (1.0 + float(np.exp(-log_odds)))
