"""Decisions on the pairs of the recorded launches in every arithmetic, and what the models of rounding foretell."""

import numpy as np
import pytest
import torch
from kit.official import OFFICIAL
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.methods import kernels
from epsdpo.paper.frozen import decisions_at
from epsdpo.paper.precision.decisions import (
    ARITHMETICS,
    EPSILONS,
    criterion_sums,
    decisions_table,
    in_bins,
    measure_pairs,
    shares,
)
from epsdpo.paper.precision.released import (
    LAUNCHES,
    MAX_LENGTH,
    agreement,
    launch_shares,
    launches_in_words,
    load_models,
    load_pairs,
    recorded_decisions,
)
from epsdpo.paper.precision.rounding import decisions

REGIMES = OFFICIAL.parent / "regimes"


@pytest.fixture(scope="module")
def recorded():
    return recorded_decisions(REGIMES)


@pytest.fixture(scope="module")
def measured():
    """Weights in bfloat16, as most launches had them."""
    return measure_pairs(*load_models(REGIMES, torch.bfloat16), load_pairs(REGIMES), MAX_LENGTH, EPSILONS)


# --------------------------------------------------------------------------------------------------- what was recorded


def test_the_table_of_launches_by_hand(recorded):
    """Counts of the published launch at ε = 0.01 are 8, 85 and 3; Wilson's interval of 85 of 96 is 80.6 to 93.5 %."""
    assert len(recorded) == len(LAUNCHES) * 3 * 96
    table = launch_shares(recorded).set_index(["launch", "epsilon"])
    published = table.loc[("DeepSpeed ZeRO-3, bf16 (published)", 0.01)]
    assert (published[["relaxed", "tied", "tightened"]] * 96).tolist() == [8, 85, 3]
    assert published["mean_step"] == pytest.approx(5 / 96)
    assert (published["tied_low"], published["tied_high"]) == pytest.approx((0.806, 0.935), abs=0.001)
    ties = table.groupby(["arithmetic", "epsilon"])["tied"].agg(["min", "max"])
    assert ties.loc[("bfloat16", 0.01), "min"] > 0.85 and ties.loc["bfloat16_logits", "max"].max() < 0.03


def test_the_shown_table_has_a_row_per_launch_in_their_order(recorded):
    shown = launches_in_words(launch_shares(recorded))
    assert [launch for launch, _ in shown.index] == [words for words, _ in LAUNCHES.values()]
    assert shown[(0.01, "tie")].iloc[0] == "89% [81, 93]"
    assert shown[(0.1, "β⁻ / β⁺ (mean step)")].iloc[0] == "54% / 17% (+0.38)"
    assert list(dict.fromkeys(epsilon for epsilon, _ in shown.columns)) == [0.005, 0.01, 0.1]


def test_a_folder_without_launches_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="tests/data/regimes of a checkout"):
        load_models(tmp_path, torch.bfloat16)


def test_measured_decisions_are_the_launches(recorded, measured):
    """All pairs in one batch, where a launch had each in its own, so that a near-tie may fall otherwise."""
    equal = agreement(measured, recorded)
    assert list(equal.index) == [words for words, _ in LAUNCHES.values()] and list(equal.columns) == [0.005, 0.01, 0.1]
    assert (equal > 0.9).all(axis=None)
    for launch in ("R6_single_pure_bf16", "R3_single_bf16loaded"):  # the others' weights or frequencies are not these
        assert (equal.loc[LAUNCHES[launch][0]] >= 0.97).all()


# ------------------------------------------------------------------------------------------------- what the models say


def test_the_model_of_rounded_sums_foretells_them(measured):
    """Without a free parameter: every share is within 2 points of the model or its Wilson interval."""
    table = shares(measured)
    coarse = table[table["arithmetic"] == "sums_rounded"]
    assert (coarse["predicted"].between(coarse["low"] - 0.02, coarse["high"] + 0.02)).all()
    ties = coarse[coarse["decision"] == "tied"].set_index("epsilon")["share"]
    assert ties[0.005] > 0.9 and ties[0.2] < 0.3  # there is something to foretell
    assert table[table["arithmetic"] == "float32"]["predicted"].isna().all()


def test_shares_with_rounded_logits_and_in_float16(measured):
    """With rounded logits as exactly; float16 ties in between, as eight times as fine a grid has it."""
    table = shares(measured)
    for arithmetic in ("bfloat16_logits", "float16"):
        rows = table[table["arithmetic"] == arithmetic]
        assert (rows["predicted"].between(rows["low"] - 0.05, rows["high"] + 0.05)).all(), arithmetic
    ties = table[table["decision"] == "tied"].pivot(index="epsilon", columns="arithmetic", values="share")
    assert (ties["bfloat16_logits"] < 0.1).all()
    assert ties.loc[0.005, "bfloat16_logits"] + 0.2 < ties.loc[0.005, "float16"] < ties.loc[0.005, "bfloat16"] - 0.2


def test_the_noise_of_rounded_logits_has_the_derived_size(measured):
    """A pair turns only where its slope is small beside the derived deviation."""
    at = measured[measured["epsilon"] == 0.005]
    turned = at["bfloat16_logits"] * at["float32"] < 0
    slope = (at["slope_chosen"] - at["slope_rejected"]).abs()
    assert (slope[turned] < 3.0 * at["slope_noise"][turned]).all()
    assert at["slope_noise"].between(0.01, 10.0).all()


def test_pairs_that_move_together_by_little_tie():
    """The sharpest prediction, on measured sums: below half a step of both grids such pairs do not step."""
    models = load_models(REGIMES, torch.bfloat16)
    measured = measure_pairs(*models, load_pairs(REGIMES), MAX_LENGTH, [0.0005])
    shifts = measured[["slope_chosen", "slope_rejected"]].mul(measured["epsilon"], axis=0)
    together = np.sign(shifts["slope_chosen"]) == np.sign(shifts["slope_rejected"])
    # The smaller sum's grid is finer, by 4 at most here; an eighth of the larger one's is half a step of it.
    alike = measured[together & (shifts.abs().max(axis=1) < measured["spacing"] / 8)]
    assert len(alike) > 30
    assert (alike["sums_rounded"] == 0).all()
    assert (alike["float32"] != 0).mean() > 0.9


def test_sums_are_those_of_the_kernel():
    """Each arithmetic decides as the criterion does in it wherever else it is computed."""
    policy, reference = load_models(REGIMES, torch.float32)
    pairs = load_pairs(REGIMES).select(range(32)).to_list()
    batch = DataCollatorForPreference(pad_token_id=0, max_length=MAX_LENGTH)(pairs)
    (sums,) = criterion_sums(policy, reference, batch, [0.1])
    assert {"float32", "sums_rounded", *sums.steps} == set(ARITHMETICS)
    for name, arithmetic in kernels.ARITHMETICS.items():
        (expected,) = decisions_at(policy, reference, batch, [0.1], arithmetic)
        if name in sums.steps:
            np.testing.assert_array_equal(sums.steps[name], expected)
        else:
            assert np.mean(decisions(sums.exact) == expected) > 0.95  # ties of float32 itself may fall either way
    assert sums.tokens.tolist() == [len(row[f"{part}_ids"]) for part in ("chosen", "rejected") for row in pairs]
    table = decisions_table([row["pair_id"] for row in pairs], 0.1, sums)
    assert (table["size"] >= np.abs(sums.exact[0]).reshape(2, 32).min(axis=0)).all()


def test_bins_hold_alike_many_and_are_named_by_their_median(measured):
    binned = in_bins(measured, "tokens", bins=4)
    assert binned["bin"].nunique() == 4
    for centre, rows in binned.groupby("bin"):
        assert rows["tokens"].median() == centre
        assert len(rows) > len(measured) / 10
