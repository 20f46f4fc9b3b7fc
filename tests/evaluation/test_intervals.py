"""Bootstrap and Student's t against scipy, and how often the bootstrap covers the truth."""

import numpy as np
import pytest
from scipy.stats import bootstrap, t

from epsdpo.evaluation.scores.intervals import bootstrap_interval, t_interval


def test_bootstrap_interval_is_scipys_percentile_interval():
    values = np.random.default_rng(1).gamma(2.0, size=150)
    ours = bootstrap_interval(values, samples=20_000, seed=3)
    theirs = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=4).confidence_interval
    # The two draw different resamples: Monte Carlo error of a 2.5 % quantile of 20,000 is about 0.02 standard errors.
    tolerance = 0.1 * values.std() / np.sqrt(values.size)
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_bootstrap_interval_is_repeatable_and_follows_seed_and_level():
    values = np.random.default_rng(2).random(40)
    interval = bootstrap_interval(values, 500, seed=0)
    assert interval == bootstrap_interval(values, 500, seed=0)
    assert interval != bootstrap_interval(values, 500, seed=1)
    narrower = bootstrap_interval(values, 500, seed=0, level=0.5)
    assert interval.low < narrower.low < values.mean() < narrower.high < interval.high


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for repetition in range(300):
        interval = bootstrap_interval(generator.exponential(size=60), 300, seed=repetition)
        covered += interval.low < 1.0 < interval.high
    assert 0.88 < covered / 300 < 0.98


def test_bootstrap_of_a_rate_per_unit_resamples_both_sums():
    units = np.array([1.0, 10.0, 100.0, 1000.0])
    interval = bootstrap_interval(0.25 * units, 200, seed=0, units=units)
    assert (interval.low, interval.high) == pytest.approx((0.25, 0.25))
    unequal = bootstrap_interval([1.0, 0.0], 500, seed=0, units=[1.0, 3.0])
    assert (unequal.low, unequal.high) == pytest.approx((0.0, 1.0))


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_bootstrap_refuses_missing_values(values):
    with pytest.raises(ValueError, match="one number per prompt"):
        bootstrap_interval(values, 10, seed=0)


def test_the_interval_of_independent_numbers_is_students():
    interval = t_interval([60.0, 62.0, 67.0])
    expected = t.interval(0.95, 2, loc=63.0, scale=np.sqrt(13.0 / 3.0))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_one_number_has_no_t_interval():
    with pytest.raises(ValueError, match="two numbers at least, there is 1"):
        t_interval([60.0])
