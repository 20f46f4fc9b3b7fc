"""What rounding leaves of the criterion of Eq. 5: how often a pair can step when its sums, or its logits, are rounded.

Arithmetic on sums of log-probabilities, in nats; no model is run.

**The derivation.** The criterion compares z = C - R at ε, 0 and -ε, with C and R the summed log-probabilities of the
chosen and the rejected response. bfloat16 has 8 significant bits, so a sum of size 2^k to 2^(k+1) is rounded to a
multiple of q = 2^(k-7): with S the size, q lies between S/256 and S/128. To first order in ε, C moves by ±εg with

    g = d log π̂/dε = log-ratio of the response - Σ_t KL(π‖π_ref) at its tokens,

so that a = ε|g|/q is the shift in units of the grid. Let the place of C in its grid cell be uniform. A shift of a < ½
to the one side and to the other crosses a cell's edge on at most one of the two sides, with chance a each. So

- one moving sum alone never steps below half a grid step: the chance is clip(2a - 1, 0, 1);
- two sums that move in the same direction never step either while both shifts are below half a grid step;
- two that move apart, by a and b < ½ of their grids, step with chance 2ab: one edge is crossed by the chosen sum on the
  one side and one by the rejected sum on the other. It is proportional to ε².

Above half a step the chances rise to 1. For any shifts the pair's three comparisons depend on the two places through
where each crosses its edges, two per sum, so that the chance is a sum of nine areas: `step_chances` adds them up.

z itself is rounded too. It is a multiple of the finer of the two grids, and exact unless |z| is beyond what 8 bits hold
of that grid, which is where one sum is more than twice the other. The finer grid then counts for nothing, and z's own
takes its place.

**float16** has 11 significant bits: the same with q between S/2048 and S/1024, so that a shift is eight times as many
grid steps. Sums beyond 65,504 would be infinite in it, and such a pair would tie; those of the study are below 1,000.

**What the model leaves out**: second roundings that fall half-way between two values; grids that change because a shift
carries a sum over a power of two; and the rounding of logits, perturbed logits and log-softmax, which comes before the
sums. That last error is a fixed function of each logit, other at each ε, and does not shrink with ε. It can make and
unmake steps, and it need not favour both directions alike.

**Logits rounded and nothing else** is another case: the sums lie on no grid but are those of two slightly different
models, and the exact criterion is applied to these. The slope of a pair's log-ratio has an error whose size
`logit_noise` derives. Taken as normal it turns the sign of the slope where that is small beside it, and makes no ties:
`noisy_chances`.
"""

import numpy as np
import pandas as pd
from scipy.special import ndtr

BFLOAT16, FLOAT16 = 8, 11  # significant bits, the leading one included


def grid_spacing(size: np.ndarray, bits: int = BFLOAT16) -> np.ndarray:
    """Distance between neighbouring numbers of so many significant bits around `size`, in its units; 0 around 0.

    A bfloat16 number of size 2^k up to 2^(k+1) has neighbours 2^(k-7) away.
    """
    _, exponent = np.frexp(size)  # size = m·2^exponent with ½ ≤ |m| < 1
    return np.where(np.asarray(size) == 0.0, 0.0, np.ldexp(1.0, exponent - bits))


def rounded(values: np.ndarray, bits: int = BFLOAT16) -> np.ndarray:
    """The nearest numbers of so many significant bits, halves to even, as float64."""
    values = np.asarray(values, dtype=np.float64)
    spacing = np.where(values == 0.0, 1.0, grid_spacing(values, bits))
    return np.rint(values / spacing) * spacing


def decisions(sums: np.ndarray) -> np.ndarray:
    """The decisions (pairs,) of Eq. 5 in exact arithmetic, from sums (3, 2·pairs) as for `rounded_decisions`."""
    return _strict_steps(*np.subtract(*np.split(np.asarray(sums, dtype=np.float64), 2, axis=1)))


def rounded_decisions(sums: np.ndarray, bits: int = BFLOAT16) -> np.ndarray:
    """The decisions of Eq. 5 when the sums, and then their differences, are rounded, and nothing else is.

    Args:
        sums: (3, 2·pairs) summed log-probabilities in nats at 0, +ε and -ε, chosen responses first, then rejected.
        bits: significant ones of what they are rounded to.

    Returns:
        (pairs,) int64: +1 for β⁻, -1 for β⁺, 0 for a tie.
    """
    return _strict_steps(*rounded(np.subtract(*np.split(rounded(sums, bits), 2, axis=1)), bits))


def step_chances(sums: np.ndarray, bits: int = BFLOAT16) -> np.ndarray:
    """How likely each decision is when the sums are rounded and their places in their grid cells are left to chance.

    Args:
        sums, bits: as for `rounded_decisions`. Of the current sums only the size counts, of the others the shift.

    Returns:
        (pairs, 3): chances of β⁻, tie and β⁺.
    """
    chosen, rejected = np.split(np.asarray(sums, dtype=np.float64), 2, axis=1)
    of_difference = grid_spacing(chosen[0] - rejected[0], bits)
    return chances_of_shifts(
        chosen[1:] - chosen[0],
        rejected[1:] - rejected[0],
        np.maximum(grid_spacing(chosen[0], bits), of_difference),
        np.maximum(grid_spacing(rejected[0], bits), of_difference),
    )


def noisy_chances(sums: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """How likely each decision is when one normal error is added to the log-ratio's shift at +ε and taken off at -ε.

    Args:
        sums: as for `rounded_decisions`.
        deviation: (pairs,) of the error, in nats; where it is 0 the decision is the exact one.

    Returns:
        (pairs, 3): chances of β⁻, tie and β⁺.
    """
    current, lowered, raised = np.subtract(*np.split(np.asarray(sums, dtype=np.float64), 2, axis=1))
    # Above both edges the error makes a β⁻, below both a β⁺.
    low, high = np.sort([current - lowered, raised - current], axis=0)
    scale = np.where(deviation > 0.0, deviation, 1.0)
    below_low = np.where(deviation > 0.0, ndtr(low / scale), low > 0.0)
    below_high = np.where(deviation > 0.0, ndtr(high / scale), high >= 0.0)
    return np.stack([1.0 - below_high, below_high - below_low, below_low], axis=1)


def chances_of_shifts(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_spacing: np.ndarray | float = 1.0,
    rejected_spacing: np.ndarray | float = 1.0,
) -> np.ndarray:
    """The chances behind `step_chances`, from exact shifts and the grids that they are rounded on.

    Args:
        chosen, rejected: (2, pairs) shifts of the sum at +ε and at -ε, in nats.
        chosen_spacing, rejected_spacing: (pairs,) or one for all, in nats; the one a power of two times the other.

    Returns:
        (pairs, 3): chances of β⁻, tie and β⁺.
    """
    chosen_chance, (chosen_lowered, chosen_raised) = _grid_moves(chosen, chosen_spacing)
    rejected_chance, (rejected_lowered, rejected_raised) = _grid_moves(rejected, rejected_spacing)
    chance = chosen_chance[:, None] * rejected_chance
    steps = _strict_steps(0.0, chosen_lowered[:, None] - rejected_lowered, chosen_raised[:, None] - rejected_raised)
    return np.stack([np.where(steps == step, chance, 0.0).sum(axis=(0, 1)) for step in (1, 0, -1)], axis=1)


def simulated_cases(shifts: np.ndarray, pairs: int = 4000, seed: int = 0) -> pd.DataFrame:
    """The three cases of the derivation: the chance of β⁻, and how often sums of 64 to 128 nats give it when rounded.

    Args:
        shifts: of the sum that moves more, in grid steps of ½ nat.
        pairs: how many are drawn for each shift.
        seed: of the draws.

    Returns:
        One row per case and shift: case, shift, chance, simulated.
    """
    cases = {"apart, by as much each": -1.0, "one sum alone": 0.0, "together, one by half as much": 0.5}
    random = np.random.default_rng(seed)
    rows = []
    for case, of_rejected in cases.items():
        for shift in shifts:
            moves = np.repeat([shift, shift * of_rejected], pairs)
            chosen, rejected = np.split(np.stack([moves, -moves]), 2, axis=1)
            current = random.uniform(-126.0, -66.0, 2 * pairs)
            steps = rounded_decisions(np.stack([current, current + moves / 2, current - moves / 2]))
            chance = chances_of_shifts(chosen[:, :1], rejected[:, :1])[0, 0]
            rows.append({"case": case, "shift": shift, "chance": chance, "simulated": (steps == 1).mean()})
    return pd.DataFrame(rows)


def _grid_moves(shifts: np.ndarray, spacing: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """The three ways in which a rounded sum can move: their chances (3, pairs), and moves (2, 3, pairs) in nats.

    With its place u uniform in [0, 1) the sum moves by floor(u + shift) grid steps, which changes once in that interval
    for each of the two shifts.
    """
    shifts = shifts / spacing
    crossings = np.sort(1.0 - (shifts - np.floor(shifts)), axis=0)
    edges = np.concatenate([np.zeros_like(crossings[:1]), crossings, np.ones_like(crossings[:1])])
    places = (edges[1:] + edges[:-1]) / 2
    return np.diff(edges, axis=0), np.floor(places + shifts[:, None]) * spacing


def _strict_steps(current: np.ndarray | float, lowered: np.ndarray, raised: np.ndarray) -> np.ndarray:
    """Eq. 5 for given log-ratios at 0, +ε and -ε."""
    relaxed = (lowered > current) & (current > raised)
    tightened = (lowered < current) & (current < raised)
    return relaxed.astype(np.int64) - tightened
