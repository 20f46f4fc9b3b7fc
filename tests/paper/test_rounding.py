"""The models of rounding: by hand, against torch's own bfloat16 and float16, and the fit to the paper's Table 5."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epsdpo.methods.kernels import Head, pair_steps
from epsdpo.paper.precision.logit_noise import slope_variances
from epsdpo.paper.precision.rounding import (
    BFLOAT16,
    FLOAT16,
    chances_of_shifts,
    grid_spacing,
    noisy_chances,
    rounded,
    rounded_decisions,
    step_chances,
)
from epsdpo.paper.precision.table_5 import SlopePopulation, fit_rounded_sums, fits

BOTH_SIDES = np.array([[1.0], [-1.0]])


def pair(chosen, rejected, chosen_shift, rejected_shift):
    """Sums (3, 2) of one pair whose shifts at -ε mirror those at +ε."""
    current, shift = np.array([chosen, rejected]), np.array([chosen_shift, rejected_shift])
    return np.stack([current, current + shift, current - shift])


def as_torch(values, dtype):
    return torch.tensor(values, dtype=torch.float32).to(dtype).double().numpy()


# ------------------------------------------------------------------------------------------------------------ the grid


def test_spacing_by_hand():
    """Between 64 and 128 a step is ½, just below 64 it is ¼; 0 has no grid of its own."""
    np.testing.assert_array_equal(grid_spacing(np.array([64.0, -127.9, 63.9, 1.0, 0.0])), [0.5, 0.5, 0.25, 2**-7, 0.0])


@given(st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_rounding_is_torchs(values):
    np.testing.assert_array_equal(rounded(values), as_torch(values, torch.bfloat16))


@given(st.lists(st.floats(2.0**-14, 65504.0, width=32), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_rounding_to_float16_is_torchs(values):
    np.testing.assert_array_equal(rounded(values, FLOAT16), as_torch(values, torch.float16))


# ------------------------------------------------------------------------------------------------------ chances by hand


@pytest.mark.parametrize(
    ("chosen", "rejected", "chances"),
    [
        (0.3, 0.0, (0.0, 1.0, 0.0)),  # one sum alone, below half a step
        (0.7, 0.0, (0.4, 0.6, 0.0)),  # 2a - 1
        (1.2, 0.0, (1.0, 0.0, 0.0)),
        (0.3, -0.1, (0.06, 0.94, 0.0)),  # apart: 2ab
        (-0.3, 0.1, (0.0, 0.94, 0.06)),
        (0.3, 0.1, (0.0, 1.0, 0.0)),  # together, both below half a step: never
        (0.3, -0.7, (0.58, 0.42, 0.0)),  # the rejected sum crosses on both sides (0.4), or on one (0.6) and 0.3 helps
        (1.0, 1.0, (0.0, 1.0, 0.0)),  # both move by one step
    ],
)
def test_chances_by_hand(chosen, rejected, chances):
    """Shifts in steps of one grid, so that the numbers are those of the derivation."""
    found = chances_of_shifts(BOTH_SIDES * chosen, BOTH_SIDES * rejected)
    np.testing.assert_allclose(found, [chances], atol=1e-12)


def test_a_coarse_difference_replaces_the_finer_grid():
    """100 and 20 are known to ½ and ⅛, their difference of 80 to ½: a shift of ¼ of the smaller sum is half a step."""
    fine = step_chances(pair(-100.2, -20.1, 0.0, 0.25))
    np.testing.assert_allclose(fine, [[0.0, 1.0, 0.0]], atol=1e-12)
    coarse = step_chances(pair(-100.2, -20.1, 0.0, 0.45))
    np.testing.assert_allclose(coarse, [[0.0, 0.2, 0.8]], atol=1e-12)
    # Sums of 30 and 20 are both known to ⅛, and so is their difference.
    np.testing.assert_allclose(step_chances(pair(-30.2, -20.1, 0.0, 0.25)), [[0.0, 0.0, 1.0]], atol=1e-12)


@given(*(st.floats(-3, 3) for _ in range(4)), st.sampled_from([0.25, 1.0, 2.0]))
@settings(deadline=None, max_examples=100)
def test_chances_are_a_distribution_and_mirror(up, down, rejected_up, rejected_down, spacing):
    """Swapping the responses, or +ε and -ε, swaps β⁻ and β⁺; asymmetric shifts are allowed."""
    chosen, rejected = np.array([[up], [down]]), np.array([[rejected_up], [rejected_down]])
    chances = chances_of_shifts(chosen, rejected, 1.0, spacing)
    assert (chances >= -1e-12).all() and chances.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(chances_of_shifts(rejected, chosen, spacing, 1.0), chances[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(
        chances_of_shifts(chosen[::-1], rejected[::-1], 1.0, spacing), chances[:, ::-1], atol=1e-12
    )


@given(st.floats(0.0, 0.499), st.floats(0.0, 0.499), st.sampled_from([0.25, 1.0, 4.0]))
@settings(deadline=None, max_examples=50)
def test_sums_that_move_together_below_half_a_step_tie(chosen, rejected, spacing):
    chances = chances_of_shifts(BOTH_SIDES * chosen, BOTH_SIDES * rejected * spacing, 1.0, spacing)
    np.testing.assert_allclose(chances, [[0.0, 1.0, 0.0]], atol=1e-12)


# ----------------------------------------------------------------------------------- chances against torch's numbers


@pytest.mark.parametrize(("dtype", "bits", "finer"), [(torch.bfloat16, BFLOAT16, 1), (torch.float16, FLOAT16, 8)])
@pytest.mark.parametrize(
    ("chosen", "rejected", "chosen_shift", "rejected_shift"),
    [
        (-90.0, -80.0, 0.15, -0.1),  # on one grid, apart, below half a step
        (-90.0, -80.0, 0.4, 0.15),  # together
        (-180.0, -90.0, 0.3, -0.4),  # on two grids
        (-90.0, -80.0, -0.7, -0.2),  # by more than a step
        (-45.0, -24.0, 0.21, 0.02),
    ],
)
def test_chances_are_frequencies_of_rounded_numbers(chosen, rejected, chosen_shift, rejected_shift, dtype, bits, finer):
    """Sums spread over many grid cells, rounded by torch: within 4 standard errors of 40,000 pairs."""
    count = 40_000
    rng = np.random.default_rng(0)
    current = np.concatenate([chosen + rng.uniform(-2, 2, count), rejected + rng.uniform(-2, 2, count)])
    shift = np.repeat([chosen_shift, rejected_shift], count) / finer
    # In float32, because torch rounds float64 to bfloat16 in two goes.
    sums = torch.tensor(np.stack([current, current + shift, current - shift]), dtype=torch.float32)
    steps = pair_steps(sums, dtype).numpy()
    np.testing.assert_array_equal(steps, rounded_decisions(sums.numpy(), bits))
    expected = step_chances(sums.numpy(), bits).mean(axis=0)
    observed = [(steps == step).mean() for step in (1, 0, -1)]
    np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / count))
    assert 0.0 < expected[1] < 1.0


# ------------------------------------------------------------------------------------------------------ rounded logits


@pytest.mark.parametrize(
    ("lowered", "raised", "deviation", "chances"),
    [
        (1.0, -1.0, 0.0, (1.0, 0.0, 0.0)),  # no error: the exact decision
        (-1.0, 1.0, 0.0, (0.0, 0.0, 1.0)),
        (0.0, 0.0, 0.0, (0.0, 1.0, 0.0)),
        (1.0, 1.0, 0.0, (0.0, 1.0, 0.0)),
        (1.0, -1.0, 1.0, (0.841345, 0.0, 0.158655)),  # one standard deviation
        (2.0, -1.0, 1.0, (0.841345, 0.135905, 0.022750)),  # between the two edges it ties
    ],
)
def test_noisy_chances_by_hand(lowered, raised, deviation, chances):
    sums = np.array([[0.0, 0.0], [lowered, 0.0], [raised, 0.0]])
    np.testing.assert_allclose(noisy_chances(sums, np.array([deviation])), [chances], atol=1e-6)


@pytest.mark.parametrize("apart", [0.02, 2.0])
def test_rounded_logits_disturb_slopes_as_derived(apart):
    """Random logits on a grid of 1/16 and coarser, models apart by less than it and by much more: to within 5 %."""
    generator = torch.Generator().manual_seed(0)
    r = 12.0 + torch.randn(4000, 64, generator=generator).clamp(-4, 4) / 2
    z = r + apart * torch.randn(r.shape, generator=generator)
    labels = torch.randint(64, (4000,), generator=generator)

    def slopes(z, r):
        d = z - r
        return d.gather(1, labels.unsqueeze(1)).squeeze(1) - (z.softmax(dim=1) * d).sum(dim=1)

    # The heads hand their states on: as many words as the states have numbers.
    head = Head(weight=torch.eye(64))
    variances = slope_variances(z, head, r, head, labels)
    errors = slopes(z.bfloat16().float(), r.bfloat16().float()) - slopes(z, r)
    scaled = errors / variances.sqrt()
    assert scaled.std().item() == pytest.approx(1.0, abs=0.05)
    assert abs(scaled.mean().item()) < 0.1


def test_equal_logits_are_not_disturbed():
    head, states = Head(weight=torch.eye(8)), torch.linspace(-3.0, 3.0, 16).reshape(2, 8)
    assert slope_variances(states, head, states, head, torch.tensor([1, 2])).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------- the paper's table


def test_fit_of_table_5():
    """Two parameters reach the three averages to about their last printed decimal; exact arithmetic cannot."""
    printed_to = 0.005  # half a unit of the last printed decimal
    table = fits()
    assert table["rounded_sums_residual"].abs().max() < 1.2 * printed_to
    assert table["exact_residual"].abs().max() > 10 * printed_to
    assert table["exact"].nunique() == 1


def test_fitted_population_is_recovered_by_simulation():
    """Slopes drawn from the population and rounded by torch give its average steps."""
    population = SlopePopulation(mean=40.0, deviation=60.0)
    count, spacing = 60_000, 0.5
    rng = np.random.default_rng(1)
    slopes = rng.normal(np.repeat([20.0, -20.0], count), 60.0) * spacing
    current = np.repeat([-96.0, -90.0], count) + rng.uniform(-4, 4, 2 * count)
    for epsilon in (0.005, 0.02):
        shift = epsilon * slopes
        steps = pair_steps(torch.tensor(np.stack([current, current + shift, current - shift])), torch.bfloat16)
        (expected,) = population.average_steps(np.array([epsilon]))
        assert steps.double().mean().item() == pytest.approx(expected, abs=0.012)


def test_below_half_a_step_the_average_grows_with_the_square():
    small = SlopePopulation(mean=4.0, deviation=1.0).average_steps(np.array([0.01, 0.02]))
    assert small[1] / small[0] == pytest.approx(4.0, rel=1e-6)


def test_far_above_the_grid_the_average_is_the_exact_one():
    population = fit_rounded_sums()
    (average,) = population.average_steps(np.array([5.0]))
    assert average == pytest.approx(population.exact_average_step(), abs=0.01)
