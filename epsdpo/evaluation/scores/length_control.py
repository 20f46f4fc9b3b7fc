"""AlpacaEval 2's length-controlled win rate in percent: the model, its fit and the choice of its regularisation.

It takes the difficulty of every prompt; for prompts without there is the length-only model, beside the raw win rate.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from epsdpo.evaluation.scores.clusters import clusters_of
from epsdpo.evaluation.scores.intervals import Interval, bootstrap, standard_error
from epsdpo.evaluation.scores.winrate import length_feature, wins_of

# What the published numbers were made with.
_GAMED_WEIGHT = 0.1
_STRENGTHS = np.logspace(-4.0, 4.0, 10)
_FOLDS = 5
_SOLVER_SEED = 123

# Keeps the log-loss finite where a prediction is 0 or 1 to the last digit.
_SMALLEST_CHANCE = 1.0e-15


@dataclass(frozen=True)
class GamedRows:
    """Judgements of two models that were told to write at length and in brief; they hold the fit in place.

    Attributes:
        wins: (rows,) chance of a win over the reference, in [0, 1].
        length_differences: (rows,) reference length - model length, in standard deviations of their model.
        difficulties: (rows,) γ of each row's prompt.
    """

    wins: np.ndarray
    length_differences: np.ndarray
    difficulties: np.ndarray


@dataclass(frozen=True)
class Coefficients:
    """Of P(model wins) = σ(φ · tanh(length difference) + ψ · γ + θ), where γ is the prompt's difficulty.

    Attributes:
        length: φ; negative where the judge favours the longer response.
        difficulty: ψ.
        advantage: θ.
    """

    length: float
    difficulty: float
    advantage: float


@dataclass(frozen=True)
class LengthControl:
    """AlpacaEval 2's length-controlled win rate; see `length_control`.

    Attributes:
        win_rate: 100 · mean over prompts of σ(ψ γ + θ).
        standard_error: AlpacaEval's `lc_standard_error`, the standard error of that mean over prompts. Preferences do
            not enter it, so that it says how unequal prompts are and **understates how uncertain the rate is**.
        interval: percentile bootstrap over prompts, each resample with coefficients of its own at the same C.
        c: inverse strength of the L1 penalty.
        coefficients: of the fit to all prompts.
    """

    win_rate: float
    standard_error: float
    interval: Interval
    c: float
    coefficients: Coefficients


@dataclass(frozen=True)
class _Rows:
    """What a fit sees: features (rows, 3) in the order of `Coefficients`, wins and weights (rows,)."""

    features: np.ndarray
    wins: np.ndarray
    weights: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "_Rows":
        return _Rows(self.features[rows], self.wins[rows], self.weights[rows])


def length_control(
    preferences: Sequence[float | None],
    model_lengths: Sequence[float],
    reference_lengths: Sequence[float],
    difficulties: Sequence[float],
    gamed: GamedRows,
    samples: int,
    seed: int,
    c: float | None = None,
    level: float = 0.95,
    prompts: Sequence[str] | None = None,
) -> LengthControl:
    """What AlpacaEval 2 says the win rate would be if both responses were equally long.

    P(model wins) = σ(φ · tanh((reference length - model length) / std) + ψ · γ + θ), std (n - 1) that of the
    differences, not centred (see `length_feature` for differences without spread). φ, ψ and θ maximise the likelihood
    under an L1 penalty, together with the gamed rows, of weight 0.1, in which θ has no part. A prompt without
    preference takes no part in the fit, but in the standard deviation and, since AlpacaEval does so, in the mean of
    what is predicted. A resample without a scored prompt has nothing on θ, and no part in the interval.

    The order of the prompts decides their folds in cross-validation and hence, in close cases, C: published numbers
    need AlpacaEval's order, and the same order gives the same number.

    Args:
        preferences: as for `win_rate`, one per prompt.
        model_lengths: lengths of the model's responses, in characters; NaN only where the preference is missing.
        reference_lengths: lengths of the reference's responses, likewise.
        difficulties: γ of each prompt, none missing.
        gamed: AlpacaEval's.
        samples: how many times the prompts are resampled for the interval.
        seed: of the resamples.
        c: inverse strength of the penalty; by default that of ten with the best cross-validated log-loss.
        level: coverage of the interval, in (0, 1).
        prompts: what each row is about, as text; by default each is about another prompt.

    Raises:
        ValueError: if fewer than two prompts are scored, or a difficulty or a length is missing.
    """
    wins = wins_of(preferences)
    differences = np.asarray(reference_lengths, dtype=np.float64) - np.asarray(model_lengths, dtype=np.float64)
    difficulties = np.asarray(difficulties, dtype=np.float64)
    scored = ~np.isnan(wins)
    if scored.sum() < 2:
        raise ValueError(f"length control needs two scored prompts at least; {scored.sum()} of {wins.size} are scored")
    if np.isnan(difficulties).any():
        raise ValueError(f"{np.isnan(difficulties).sum()} of {wins.size} prompts have no difficulty")
    if np.isnan(differences[scored]).any():
        raise ValueError(f"{np.isnan(differences[scored]).sum()} of {scored.sum()} scored prompts have no length")
    anchor = _gamed_rows(gamed)
    if c is None:
        c = _chosen_c(_together(anchor, wins, differences, difficulties))
    coefficients = _fit(_together(anchor, wins, differences, difficulties), c)
    chances = predicted_chances(coefficients, difficulties)

    def rate(rows: np.ndarray) -> float:
        if not scored[rows].any():  # which says nothing of θ
            return math.nan
        fitted = _fit(_together(anchor, wins[rows], differences[rows], difficulties[rows]), c)
        return 100.0 * predicted_chances(fitted, difficulties[rows]).mean()

    return LengthControl(
        win_rate=100.0 * float(chances.mean()),
        standard_error=100.0 * standard_error(chances, prompts),
        interval=bootstrap(rate, clusters_of(prompts, wins.size), samples, seed, level),
        c=float(c),
        coefficients=coefficients,
    )


def predicted_chances(model: Coefficients, difficulties: np.ndarray) -> np.ndarray:
    """Chance that a model beats the reference at equal lengths on prompts of these difficulties: σ(ψ γ + θ)."""
    return expit(model.difficulty * difficulties + model.advantage)


def _gamed_rows(gamed: GamedRows) -> _Rows:
    no_advantage = np.zeros_like(gamed.wins)
    return _Rows(
        np.column_stack([np.tanh(gamed.length_differences), gamed.difficulties, no_advantage]),
        gamed.wins,
        np.full_like(gamed.wins, _GAMED_WEIGHT),
    )


def _together(anchor: _Rows, wins: np.ndarray, differences: np.ndarray, difficulties: np.ndarray) -> _Rows:
    """The gamed rows, then the scored prompts."""
    length = length_feature(differences)
    scored = ~np.isnan(wins)
    features = np.column_stack([length, difficulties, np.ones_like(length)])[scored]
    return _Rows(
        np.concatenate([anchor.features, features]),
        np.concatenate([anchor.wins, wins[scored]]),
        np.concatenate([anchor.weights, np.ones(scored.sum())]),
    )


def _chosen_c(rows: _Rows) -> float:
    """The C with the smallest mean log-loss over five folds; the smallest C of several.

    Rows are dealt into folds in turn, whatever machine or version this runs on, and the two halves of a row go
    together. Losses of neighbouring C often differ by less than a millionth: a rate is to be read with its C.
    """
    folds = np.arange(rows.wins.size) % _FOLDS
    losses = [
        np.mean([_log_loss(_fit(rows[folds != fold], c), rows[folds == fold]) for fold in range(_FOLDS)])
        for c in _STRENGTHS
    ]
    return float(_STRENGTHS[np.argmin(losses)])


def _fit(rows: _Rows, c: float) -> Coefficients:
    """Each row enters as a win of weight y and a loss of weight 1 - y."""
    # liblinear visits rows in a random order and stops early, so seed and tolerance are part of the published number.
    model = LogisticRegression(
        C=c, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=_SOLVER_SEED, tol=1.0e-4
    )
    model.fit(
        np.concatenate([rows.features, rows.features]),
        np.repeat([1, 0], rows.wins.size),
        sample_weight=np.concatenate([rows.weights * rows.wins, rows.weights * (1.0 - rows.wins)]),
    )
    return Coefficients(*map(float, model.coef_[0]))


def _log_loss(coefficients: Coefficients, rows: _Rows) -> float:
    logits = rows.features @ [coefficients.length, coefficients.difficulty, coefficients.advantage]
    chances = np.clip(expit(logits), _SMALLEST_CHANCE, 1.0 - _SMALLEST_CHANCE)
    return -float(np.mean(rows.weights * (rows.wins * np.log(chances) + (1.0 - rows.wins) * np.log1p(-chances))))
