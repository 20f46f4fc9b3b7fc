"""Decisions of the released code's reference runs in three arithmetics, and what the model foretells."""

import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from epsdpo.methods.kernels import ARITHMETICS
from epsdpo.paper.frozen import decisions_at
from epsdpo.paper.precision.decisions import criterion_sums, decisions_table, in_bins, measure_pairs, shares
from epsdpo.paper.precision.released import MAX_LENGTH, load_models, load_pairs, released_decisions
from epsdpo.paper.precision.rounding import decisions, rounded_decisions


@pytest.fixture(scope="module")
def pairs(official):
    return load_pairs(official)


def test_pairs_are_tokenised_as_the_other_tests_do(pairs, official_pairs):
    assert pairs.to_list() == official_pairs.to_list()


@pytest.fixture(scope="module")
def measured(official, pairs):
    """Weights in bfloat16, as the released code had them; twice the ε of its runs beside."""
    policy, reference = load_models(official, torch.bfloat16)
    return measure_pairs(policy, reference, pairs, MAX_LENGTH, (0.05, 0.1, 0.2, 0.4))


def test_measured_decisions_are_the_released_codes(official, measured):
    joined = measured.merge(released_decisions(official), on=["pair_id", "epsilon"])
    assert len(joined) == 2 * 96
    assert (joined["bfloat16"] == joined["released"]).mean() >= 0.98


def test_model_foretells_the_reference_runs(measured):
    """Every measured share in bfloat16 is within its own Wilson interval of the model, which has no free parameter."""
    table = shares(measured)
    coarse = table[table["arithmetic"] == "bfloat16"]
    assert (coarse["predicted"].between(coarse["low"] - 0.02, coarse["high"] + 0.02)).all()
    ties = coarse[coarse["decision"] == "tied"].set_index("epsilon")["share"]
    assert ties[0.05] > 0.9 and ties[0.4] < 0.5  # there is something to foretell
    exact = table[(table["arithmetic"] == "float32") & (table["decision"] == "tied")]
    assert (exact["share"] < 0.1).all()
    assert table[table["arithmetic"] == "float32"]["predicted"].isna().all()


def test_pairs_that_move_together_by_little_tie(measured):
    """The sharpest prediction, on measured sums: below half a step of both grids such pairs do not step."""
    shifts = measured[["slope_chosen", "slope_rejected"]].mul(measured["epsilon"], axis=0)
    together = np.sign(shifts["slope_chosen"]) == np.sign(shifts["slope_rejected"])
    # The smaller sum's grid is finer, by 4 at most here; an eighth of the larger one's is half a step of it.
    alike = measured[together & (shifts.abs().max(axis=1) < measured["spacing"] / 8)]
    assert len(alike) > 30
    assert (alike["sums_rounded"] == 0).all()
    assert (alike["float32"] != 0).mean() > 0.9


def test_sums_are_those_of_the_kernel(official, pairs):
    """Exact decisions are the kernel's in float32; rounding the sums of rounded tokens gives its bfloat16 ones."""
    policy, reference = load_models(official, torch.float32)
    batch = DataCollatorForPreference(pad_token_id=0, max_length=MAX_LENGTH)(pairs.select(range(32)).to_list())
    (sums,) = criterion_sums(policy, reference, batch, [0.1])
    exact, coarse = (
        decisions_at(policy, reference, batch, [0.1], ARITHMETICS[name])[0] for name in ("float32", "bfloat16")
    )
    assert np.mean(decisions(sums.exact) == exact) > 0.95  # ties of float32 itself may fall either way
    np.testing.assert_array_equal(sums.bfloat16_steps, coarse)
    np.testing.assert_array_equal(rounded_decisions(sums.rounded_tokens), coarse)
    assert sums.tokens.tolist() == [
        len(row[f"{part}_ids"]) for part in ("chosen", "rejected") for row in pairs.select(range(32)).to_list()
    ]
    table = decisions_table([row["pair_id"] for row in pairs.select(range(32)).to_list()], 0.1, sums)
    assert (table["size"] >= np.abs(sums.exact[0]).reshape(2, 32).min(axis=0)).all()


def test_bins_hold_alike_many_and_are_named_by_their_median(measured):
    binned = in_bins(measured, "tokens", bins=4)
    assert binned["bin"].nunique() == 4
    for centre, rows in binned.groupby("bin"):
        assert rows["tokens"].median() == centre
        assert len(rows) > len(measured) / 10
