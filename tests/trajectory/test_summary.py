"""Tables of a β record, by hand-counted numbers and against statistics of another library."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from epsdpo import plots
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.methods.record_writer import BetaRecord
from epsdpo.plots.trajectory import beta_trajectory, decision_fractions, decisions_by, training_curves
from epsdpo.trajectory import summary as trajectory
from epsdpo.trajectory.summary import compare, examples, summarise, with_lengths


@pytest.fixture
def train_dir(tmp_path):
    """Twelve steps of four pairs: the first half relaxes 3 and tightens 1, the second half ties 2 and tightens 2."""
    record = BetaRecord(tmp_path / "train")
    record.rewind(0)
    beta = 0.1
    for step in range(1, 13):
        decisions = [1, 1, 1, -1] if step <= 6 else [0, 0, -1, -1]
        after = beta / (1 + 0.1 * np.mean(decisions))
        pairs = pd.DataFrame(
            {
                "step": step,
                "epoch": step / 12,
                "pair_id": [f"pair-{(4 * step + place) % 24}" for place in range(4)],
                "decision": decisions,
                "beta": beta,
                "chosen_logps": [-1.0 + place for place in range(4)],
                "rejected_logps": -1.0,
                "ref_chosen_logps": -1.0,
                "ref_rejected_logps": -1.0,
                "chosen_tokens": [5, 6, 7, 8],
                "rejected_tokens": 6,
            }
        )
        row = {"step": step, "beta_before": beta, "beta_after": after, "loss": 0.7, "seconds": 60 if step == 4 else 0.5}
        record.append(row | {"log_ratio_margin": 1.5, "reward_accuracy": 0.75, "reward_margin": 0.1}, pairs)
        beta = after
    record.close()
    return tmp_path / "train"


def test_summary_by_hand(train_dir):
    summary = summarise(train_dir)
    assert summary["steps"] == 12 and summary["pairs"] == 48
    assert summary["relaxed"] == 18 / 48 and summary["tied"] == 12 / 48 and summary["tightened"] == 18 / 48
    assert summary["mean_step"] == 0.0
    assert summary["beta_initial"] == 0.1
    assert summary["beta_min"] == pytest.approx(0.1 / 1.05**6)
    assert summary["beta_final"] == pytest.approx(0.1 / 1.05**6 / 0.95**6)
    assert summary["seconds_per_step"] == 0.5  # the pause at step 4 does not count


def test_fractions_are_pooled_with_wilson_intervals(train_dir):
    table = trajectory.decision_fractions(read_pairs(train_dir), windows=4).set_index(["first_step", "decision"])
    assert table.loc[(1, "relaxed"), ["last_step", "pairs", "share"]].tolist() == [3, 12, 0.75]
    assert table.loc[(10, "tightened"), "share"] == 0.5
    low, high = table.loc[(1, "relaxed"), ["low", "high"]]
    # Wilson's interval by its formula, n = 12, k = 9.
    z, n, share = stats.norm.ppf(0.975), 12, 0.75
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    assert (low, high) == pytest.approx((middle - half, middle + half))
    assert (table.groupby(level=0)["share"].sum() == 1.0).all()


def test_decisions_by_a_quantity(train_dir):
    pairs = with_lengths(read_pairs(train_dir))
    assert sorted(pairs["length_difference"].unique()) == [-1, 0, 1, 2]
    assert pairs["length"].max() == 14
    table = trajectory.decisions_by(pairs, "length_difference", bins=4)
    assert table.groupby("decision")["pairs"].sum().tolist() == [48, 48, 48]
    longest = table[table["centre"] == 2].set_index("decision")["share"]
    assert longest["tightened"] == 1.0  # the fourth pair of each step
    constant = trajectory.decisions_by(pairs.assign(same=1.0), "same")
    assert constant["pairs"].tolist() == [48, 48, 48] and constant["share"].tolist() == [18 / 48, 12 / 48, 18 / 48]


def test_examples_are_of_the_last_visit_from_lowest_to_highest_margin(train_dir):
    texts = pd.DataFrame({"pair_id": [f"pair-{n}" for n in range(24)], "prompt": "p", "chosen": "c", "rejected": "r"})
    table = examples(read_pairs(train_dir), texts, "tightened", count=3)
    assert len(table) == 3 and table["step"].min() > 6
    assert table["reward_margin"].is_monotonic_increasing
    assert examples(read_pairs(train_dir), texts, "relaxed").empty  # none in the second half


def test_runs_are_compared_in_the_order_given(train_dir):
    assert compare([train_dir, train_dir], ["DPO", "ε-DPO"])["title"].tolist() == ["DPO", "ε-DPO"]


def test_figures_have_labels_units_and_their_numbers_as_csv(train_dir, tmp_path):
    steps, pairs = read_steps(train_dir), with_lengths(read_pairs(train_dir))
    fractions = trajectory.decision_fractions(pairs)
    by_length = trajectory.decisions_by(pairs, "length")
    figures = {
        "beta": (beta_trajectory({"run": steps}, {"run": "dpo"}, "title"), steps),
        "curves": (training_curves({"run": steps, "other": steps}, {"run": "dpo", "other": "ipo"}), steps),
        "fractions": (decision_fractions(fractions, "title"), fractions),
        "by": (decisions_by({"length (tokens)": by_length}, "title"), by_length),
    }
    for name, (figure, data) in figures.items():
        for axes in figure.axes:
            assert axes.get_xlabel() and axes.get_ylabel(), name
        assert figure.get_suptitle() or figure.axes[0].get_title(), name
        image = plots.save(figure, tmp_path / f"{name}.png", data=data, caption="what to see")
        assert image.data.startswith(b"\x89PNG") and (tmp_path / f"{name}.png").read_bytes() == image.data
        assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(data)
