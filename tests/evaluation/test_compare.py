"""Models beside each other and seeds joined: hand-computed numbers, symmetries, and coverage on made-up populations."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.judged import judged
from kit.published import GAMED, LEADERBOARD, rows_of, write_rows
from scipy.stats import t

from epsdpo.evaluation.scores.annotations import read_annotations
from epsdpo.evaluation.scores.compare import head_to_head, interval_over_seeds, join_seeds, predicted_win_rate
from epsdpo.evaluation.scores.length_control import Coefficients
from epsdpo.evaluation.scores.length_control_data import read_gamed
from epsdpo.evaluation.scores.winrate import win_rate

preferences_of_two = st.lists(st.tuples(st.floats(1.0, 2.0), st.floats(1.0, 2.0)), min_size=2, max_size=20)


def test_head_to_head_by_hand():
    first, second = judged([2.0, 1.5, 1.0, 1.8, None]), judged([1.0, 1.5, 1.4, 1.2, 2.0])
    result = head_to_head(first, second, samples=50, seed=0)
    assert (result.n_shared, result.n_scored) == (5, 4)
    # Differences 1, 0, -0.4 and 0.6: mean 0.3, squared deviations 0.49 + 0.09 + 0.49 + 0.09 = 1.16.
    assert result.difference == pytest.approx(30.0)
    assert result.standard_error == pytest.approx(100 * np.sqrt(1.16 / 3 / 4))
    assert result.better_share == pytest.approx(100 * 2.5 / 4)
    assert result.interval.low <= result.difference <= result.interval.high


@settings(max_examples=50, deadline=None)
@given(preferences_of_two)
def test_head_to_head_changes_sign_with_the_sides(preferences):
    first, second = (judged(side) for side in zip(*preferences, strict=True))
    forth = head_to_head(first, second, samples=20, seed=0)
    back = head_to_head(second, first, samples=20, seed=0)
    assert forth.difference == pytest.approx(-back.difference, abs=1e-9)
    assert forth.better_share == pytest.approx(100.0 - back.better_share)
    assert forth.interval.low == pytest.approx(-back.interval.high, abs=1e-9)
    difference = win_rate(first.prompts["preference"]).win_rate - win_rate(second.prompts["preference"]).win_rate
    assert forth.difference == pytest.approx(difference, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1.0, 2.0), min_size=1, max_size=20))
def test_win_rate_seen_from_the_other_side(preferences):
    rates = win_rate(preferences)
    swapped = win_rate([3.0 - preference for preference in preferences])
    assert swapped.win_rate == pytest.approx(100.0 - rates.win_rate)
    assert swapped.discrete_win_rate == pytest.approx(100.0 - rates.discrete_win_rate)
    assert (swapped.n_wins, swapped.n_losses) == (rates.n_losses, rates.n_wins)


def test_rows_are_joined_by_instruction():
    first, second = judged([1.0, 1.3, 2.0]), judged([1.9, 1.2, 1.0])
    shuffled = replace(second, prompts=second.prompts.iloc[[2, 0, 1]])
    assert head_to_head(first, shuffled, 20, 0) == head_to_head(first, second, 20, 0)
    shorter = replace(second, prompts=second.prompts.iloc[1:])
    assert head_to_head(first, shorter, 20, 0).n_shared == 2


def test_published_models_head_to_head(tmp_path):
    gemma, llama = (
        read_annotations(write_rows(tmp_path / f"{model}.json", rows_of(model)))
        for model in ("FuseChat-Gemma-2-9B-Instruct", "FuseChat-Llama-3.1-8B-Instruct")
    )
    result = head_to_head(gemma, llama, samples=500, seed=0)
    assert result.difference == pytest.approx(70.49713534560247 - 63.33158292362734)
    assert 0.0 < result.interval.low < result.difference < result.interval.high
    width = result.interval.high - result.interval.low
    assert width == pytest.approx(2 * 1.96 * result.standard_error, rel=0.15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "another"}, "has the reference 'another'"),
        ({"annotator": "another"}, "has the annotator 'another'"),
        ({"prompts": judged([1.0, 1.3], reference_length=11.0).prompts}, "2 prompts have reference outputs of differ"),
        ({"prompts": judged([None, None]).prompts}, "no prompt is scored in all of"),
    ],
)
def test_what_is_not_comparable_is_refused(changes, message):
    first = judged([1.0, 1.3])
    with pytest.raises(ValueError, match=message):
        head_to_head(first, replace(first, **changes), samples=5, seed=0)


def test_predicted_win_rate_follows_the_published_weights():
    difficulties = read_gamed(GAMED).difficulties[:805]
    reference = Coefficients(0.0, 0.0, 0.0)
    weights = {
        model: Coefficients(row["glm_w_tanh_len"], row["glm_w_difficulty"], row["glm_w_bias"])
        for model, row in LEADERBOARD.iterrows()
    }
    for model in LEADERBOARD.index.drop("NullModel"):
        expected = LEADERBOARD.loc[model, "length_controlled_winrate"]
        assert predicted_win_rate(weights[model], reference, difficulties) == pytest.approx(expected, abs=1e-6)
    gemma, alpaca = weights["FuseChat-Gemma-2-9B-Instruct"], weights["alpaca-7b"]
    forth, back = (predicted_win_rate(*pair, difficulties) for pair in ((gemma, alpaca), (alpaca, gemma)))
    assert forth + back == pytest.approx(100.0)
    assert forth > 95.0


def test_seeds_joined_by_hand():
    result = join_seeds([judged([1.0, 2.0, None]), judged([1.5, 2.0, 1.0])], samples=50, seed=0)
    assert result.rates == pytest.approx((50.0, 75.0))
    assert (result.n_prompts, result.n_left_out) == (2, 1)
    assert result.win_rate == pytest.approx(62.5)
    assert result.deviation == pytest.approx(25.0 / np.sqrt(2.0))
    # Wins 0, 100 and 50, 100. Mean squares: seeds 625, prompts 5,625, rest 625; each with one degree of freedom.
    freedom = 5625.0**2 / (625.0**2 + 5625.0**2 + 625.0**2)
    half = t.ppf(0.975, freedom) * np.sqrt(5625.0 / 4.0)
    assert (result.interval.low, result.interval.high) == pytest.approx((62.5 - half, 62.5 + half))
    half = t.ppf(0.975, 1) * 12.5
    assert (result.seeds_interval.low, result.seeds_interval.high) == pytest.approx((62.5 - half, 62.5 + half))
    assert result.prompts_interval.low == 25.0
    assert result.prompts_interval.high == 100.0


def test_equal_runs_have_no_spread():
    result = join_seeds([judged([1.0, 2.0, 1.5, 1.5])] * 3, samples=50, seed=0)
    assert result.deviation == 0.0
    assert (result.seeds_interval.low, result.seeds_interval.high) == (50.0, 50.0)
    flat = join_seeds([judged([1.5, 1.5])] * 2, samples=50, seed=0)
    assert (flat.interval.low, flat.interval.high) == (50.0, 50.0)


@pytest.mark.parametrize(("seed_spread", "prompt_spread"), [(0.03, 0.15), (0.0, 0.15), (0.05, 0.0)])
def test_the_interval_of_joined_seeds_covers_other_seeds_and_prompts(seed_spread, prompt_spread):
    generator = np.random.default_rng(4)
    covered, narrower = 0, 0
    for _ in range(200):
        wins = (
            0.5
            + generator.normal(0.0, seed_spread, (4, 1))
            + generator.normal(0.0, prompt_spread, (1, 60))
            + generator.normal(0.0, 0.08, (4, 60))
        )
        result = join_seeds([judged(run) for run in 1.0 + wins.clip(0.0, 1.0)], samples=40, seed=0)
        covered += result.interval.low < 50.0 < result.interval.high
        prompts = result.prompts_interval
        narrower += prompts.high - prompts.low < result.interval.high - result.interval.low
    assert 0.90 <= covered / 200 <= 1.0
    if seed_spread and prompt_spread:
        assert narrower > 190


def test_interval_over_seeds_is_students():
    interval = interval_over_seeds([60.0, 62.0, 67.0])
    expected = t.interval(0.95, 2, loc=63.0, scale=np.sqrt(13.0 / 3.0))
    assert (interval.low, interval.high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("runs", "message"),
    [([judged([1.5, 1.5])], "two runs at least, there is 1"), ([judged([1.5])] * 2, "two prompts at least")],
)
def test_too_few_to_join_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        join_seeds(runs, samples=5, seed=0)


def test_one_number_has_no_interval_over_seeds():
    with pytest.raises(ValueError, match="two numbers at least, there is 1"):
        interval_over_seeds([60.0])
