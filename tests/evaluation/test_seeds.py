"""Seeds joined: hand-computed numbers, and coverage on made-up populations."""

from dataclasses import replace

import numpy as np
import pytest
from kit.judged import judged
from scipy.stats import t

from epsdpo.evaluation.scores.seeds import join_seeds


def test_rows_are_joined_by_instruction():
    first, second = judged([1.0, 1.3, 2.0]), judged([1.9, 1.2, 1.0])
    shuffled = replace(second, prompts=second.prompts.iloc[[2, 0, 1]])
    assert join_seeds([first, shuffled], 20, 0) == join_seeds([first, second], 20, 0)
    shorter = replace(second, prompts=second.prompts.iloc[1:])
    assert join_seeds([first, shorter], 20, 0).n_left_out == 1


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
        join_seeds([first, replace(first, **changes)], samples=5, seed=0)


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


@pytest.mark.parametrize(
    ("runs", "message"),
    [([judged([1.5, 1.5])], "two runs at least, there is 1"), ([judged([1.5])] * 2, "two prompts at least")],
)
def test_too_few_to_join_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        join_seeds(runs, samples=5, seed=0)
