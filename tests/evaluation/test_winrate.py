"""Win rates against hand-computed numbers, scipy and data made with a known length bias."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, xlog1py, xlogy
from scipy.stats import sem

from epsdpo.evaluation.scores.intervals import bootstrap_interval
from epsdpo.evaluation.scores.winrate import average_length, length_controlled_win_rate, win_rate


def test_win_rate_by_hand():
    # Wins 1, 0.5, 0, 0.5 and 0.8: mean 0.56, squared deviations 0.1936 + 0.0036 + 0.3136 + 0.0036 + 0.0576 = 0.572.
    result = win_rate([2.0, 1.5, 1.0, 0.0, 1.8, None])
    assert (result.n_total, result.n_scored) == (6, 5)
    assert result.win_rate == pytest.approx(56.0)
    assert result.standard_error == pytest.approx(100.0 * np.sqrt(0.572 / 4 / 5))
    assert result.discrete_win_rate == pytest.approx(100.0 * (2 + 0.5 * 2) / 5)


def test_standard_error_is_scipys():
    preferences = 1.0 + np.random.default_rng(0).random(97)
    assert win_rate(preferences).standard_error == pytest.approx(100.0 * sem(preferences), rel=1e-12)


def test_one_prompt_has_a_rate_but_no_standard_error():
    result = win_rate([1.25])
    assert result.win_rate == pytest.approx(25.0)
    assert np.isnan(result.standard_error)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1.0, 2.0), min_size=1, max_size=20))
def test_win_rate_seen_from_the_other_side(preferences):
    rates = win_rate(preferences)
    swapped = win_rate([3.0 - preference for preference in preferences])
    assert swapped.win_rate == pytest.approx(100.0 - rates.win_rate)
    assert swapped.discrete_win_rate == pytest.approx(100.0 - rates.discrete_win_rate)
    assert (swapped.n_wins, swapped.n_losses) == (rates.n_losses, rates.n_wins)


@pytest.mark.parametrize("preferences", [[], [None], [float("nan"), None]])
def test_nothing_scored_is_refused(preferences):
    with pytest.raises(ValueError, match="scored"):
        win_rate(preferences)


@pytest.mark.parametrize("value", [-1.0, 0.5, 2.1])
def test_preference_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"preference {value:g} is outside"):
        win_rate([1.5, value])


def _lengths(generator, count):
    return generator.integers(20, 400, count).astype(float), generator.integers(20, 400, count).astype(float)


@pytest.mark.parametrize("count", [12, 300])
def test_length_model_maximises_the_likelihood(count):
    generator = np.random.default_rng(7)
    model_lengths, reference_lengths = _lengths(generator, count)
    difference = reference_lengths - model_lengths
    feature = np.tanh(difference / difference.std(ddof=1))
    wins = expit(-1.2 * feature + 0.4 + generator.normal(size=count))

    def negative_log_likelihood(weights):
        chance = expit(weights[0] * feature + weights[1])
        return -(xlogy(wins, chance) + xlog1py(1.0 - wins, -chance)).sum()

    best = minimize(negative_log_likelihood, [0.0, 0.0], method="BFGS", options={"gtol": 1e-6}).x
    result = length_controlled_win_rate(1.0 + wins, model_lengths, reference_lengths, samples=20, seed=0)
    tolerance = 0.03 / count  # the penalty that keeps the weights finite
    assert result.length_effect == pytest.approx(best[0], abs=tolerance)
    assert result.advantage == pytest.approx(best[1], abs=tolerance)
    assert result.win_rate == pytest.approx(100.0 * expit(best[1]), abs=25.0 * tolerance)


def test_length_control_undoes_a_judge_that_only_likes_length():
    generator = np.random.default_rng(8)
    _, reference_lengths = _lengths(generator, 20_000)
    model_lengths = reference_lengths + generator.normal(80.0, 120.0, 20_000)
    difference = reference_lengths - model_lengths
    preferences = 1.0 + (generator.random(20_000) < expit(-1.5 * np.tanh(difference / difference.std(ddof=1))))
    controlled = length_controlled_win_rate(preferences, model_lengths, reference_lengths, samples=20, seed=0)
    assert win_rate(preferences).win_rate > 60.0
    assert controlled.length_effect == pytest.approx(-1.5, abs=0.15)
    assert controlled.win_rate == pytest.approx(50.0, abs=1.5)  # three standard errors


def test_equal_lengths_leave_the_raw_win_rate():
    preferences = [1.0, 2.0, 2.0, 1.7] * 10
    result = length_controlled_win_rate(preferences, [30] * 40, [30] * 40, samples=200, seed=0)
    assert result.length_effect == 0.0
    assert result.win_rate == pytest.approx(win_rate(preferences).win_rate, abs=0.01)
    raw = bootstrap_interval(100.0 * (np.array(preferences) - 1.0), 200, seed=0)
    assert (result.interval.low, result.interval.high) == pytest.approx((raw.low, raw.high), abs=0.05)


@pytest.mark.parametrize(
    "model_lengths",
    [
        [40] * 40,  # ten more each time
        [20] * 40,
        [40] * 39 + [41],  # one of them eleven: tanh(10 / 0.16) is 1 to the last digit
        list(range(1000, 1040)),
    ],
)
def test_a_constant_difference_says_nothing_of_equal_lengths(model_lengths):
    """The rate at equal lengths may be any: with the feature constant, φ and θ come to the same."""
    result = length_controlled_win_rate([1.0, 2.0, 2.0, 1.7] * 10, model_lengths, [30] * 40, samples=20, seed=0)
    assert np.isnan([result.win_rate, result.advantage, result.length_effect]).all()
    assert np.isnan([result.interval.low, result.interval.high]).all()


def test_resamples_without_a_rate_are_left_out():
    """Three prompts, one of them with equal lengths: a quarter of the resamples are of one difference alone."""
    result = length_controlled_win_rate([2.0, 1.2, 1.6], [40, 30, 36], [30, 30, 30], samples=100, seed=0)
    assert np.isfinite([result.win_rate, result.interval.low, result.interval.high]).all()


@pytest.mark.parametrize("preference", [1.0, 1.5, 2.0])
def test_one_verdict_on_all_prompts_is_the_rate_at_equal_lengths_too(preference):
    model_lengths, reference_lengths = _lengths(np.random.default_rng(9), 50)
    result = length_controlled_win_rate([preference] * 50, model_lengths, reference_lengths, samples=20, seed=0)
    assert result.win_rate == pytest.approx(100.0 * (preference - 1.0), abs=0.1)


def test_all_wins_stay_finite():
    model_lengths, reference_lengths = _lengths(np.random.default_rng(9), 50)
    result = length_controlled_win_rate([2.0] * 50, model_lengths, reference_lengths, samples=20, seed=0)
    assert 99.9 < result.interval.low <= result.win_rate <= 100.0


def test_a_judge_that_decides_by_length_alone_stays_finite():
    model_lengths, reference_lengths = _lengths(np.random.default_rng(10), 50)
    preferences = 1.0 + (model_lengths > reference_lengths)
    result = length_controlled_win_rate(preferences, model_lengths, reference_lengths, samples=20, seed=0)
    assert np.isfinite([result.win_rate, result.length_effect, result.interval.low, result.interval.high]).all()


def test_missing_preferences_are_left_out_of_the_fit():
    model_lengths, reference_lengths = _lengths(np.random.default_rng(11), 60)
    preferences = list(1.0 + np.random.default_rng(12).random(60))
    complete = length_controlled_win_rate(preferences, model_lengths, reference_lengths, samples=10, seed=0)
    padded = length_controlled_win_rate(
        [*preferences, None, None], [*model_lengths, 9e9, 1], [*reference_lengths, 1, 9e9], samples=10, seed=0
    )
    assert padded == complete


def test_fewer_than_two_scored_prompts_are_refused():
    with pytest.raises(ValueError, match="two scored prompts at least; 1 of 2"):
        length_controlled_win_rate([1.5, None], [1, 2], [2, 1], samples=10, seed=0)


def test_average_length_counts_characters_and_cuts():
    assert average_length(["abc", "é", "日本語テキスト"]) == 3
