"""Which runs the precision study measures and compares, and what it says of them, on runs with made-up numbers."""

import numpy as np
import pandas as pd
import pytest

from epsdpo.experiment import ConfigError, check_experiment
from epsdpo.paper.precision import drawing
from epsdpo.paper.precision.answer import answer
from epsdpo.paper.precision.decisions import ARITHMETICS
from epsdpo.paper.precision.recipes import typical_runs
from epsdpo.paper.precision.twins import differences, runs_by_precision, shares_in_training, steps_of_twins
from epsdpo.report.collect import Run


def run(tmp_path, name, world=0, method="epsilon_dpo", beta_final=0.1, win_rate=None, kl=1.0, relaxed=0.5, **train):
    values = {"name": name, "title": name, "method": method, "data": {"source": "world", "world": {"seed": world}}}
    values["model"] = {"name_or_path": "world"}
    values["train"] = {"beta": 0.2, "learning_rate": 1.0e-3, "max_length": 64, "bf16": False, "use_cpu": True, **train}
    trajectory = {"beta_final": beta_final, "relaxed": relaxed, "tied": 0.9 - relaxed, "tightened": 0.1}
    trajectory["mean_step"] = relaxed - 0.1
    return Run(
        directory=tmp_path / name,
        experiment=check_experiment(values, where="test"),
        steps=pd.DataFrame({"step": [1, 2], "beta_before": [0.2, beta_final]}),
        trajectory=trajectory,
        evaluation=None if win_rate is None else {"win_rate": win_rate, "forward_kl_per_response": kl},
    )


@pytest.fixture
def runs(tmp_path):
    """Three worlds exact and in bfloat16, two of them with bfloat16 logits, a second ε in one world, a coarse run
    without an exact twin and a middle one beside it, and DPO.
    """
    made = []
    for world, gain in enumerate((1.0, 2.0, 6.0)):
        made += [
            run(
                tmp_path,
                f"exact-{world}",
                world,
                epsilon=0.01,
                criterion_dtype="float32",
                beta_final=0.1,
                win_rate=60.0,
            ),
            run(
                tmp_path,
                f"coarse-{world}",
                world,
                epsilon=0.01,
                criterion_dtype="bfloat16",
                beta_final=0.15,
                win_rate=60.0 + gain,
                relaxed=0.3,
            ),
            run(tmp_path, f"dpo-{world}", world, method="dpo"),
        ]
    made += [
        run(tmp_path, f"wide-{precision}", epsilon=0.02, criterion_dtype=precision)
        for precision in ("float32", "bfloat16")
    ]
    other_beta = [run(tmp_path, f"dpo-other-{world}", world, method="dpo", beta=0.5) for world in (0, 1, 2)]
    middle = [
        run(
            tmp_path,
            f"middle-{world}",
            world,
            epsilon=0.01,
            criterion_dtype="bfloat16_logits",
            beta_final=0.1,
            win_rate=60.0,
            kl=kl,
        )
        for world, kl in enumerate((1.1, 1.3))
    ]
    alone = [
        run(tmp_path, f"alone-{precision}", epsilon=0.05, criterion_dtype=precision)
        for precision in ("bfloat16", "bfloat16_logits")
    ]
    return [*other_beta, *made, *middle, *alone]


def test_the_typical_recipe_of_each_method_is_measured_once_per_world(runs):
    """DPO at the β of the others, ε-DPO at the ε of most, whatever the precision it was trained with."""
    names = [chosen.experiment.name for chosen in typical_runs(runs)]
    assert sorted(names) == ["dpo-0", "dpo-1", "dpo-2", "exact-0", "exact-1", "exact-2"]


def test_twins_differ_in_precision_alone(runs):
    """Beside each exact run stand all that there are; runs without an exact twin are left out."""
    twins = runs_by_precision(runs)
    assert sorted(twins["run"]) == sorted(
        [f"{kind}-{world}" for kind in ("exact", "coarse") for world in range(3)]
        + ["middle-0", "middle-1", "wide-float32", "wide-bfloat16"]
    )
    assert dict.fromkeys(twins["setting"]) == dict.fromkeys(["ε = 0.01", "ε = 0.02"])
    steps = steps_of_twins(runs, twins)
    assert len(steps) == 2 * len(twins)
    assert steps.loc[steps["run"] == "coarse-1", "beta_before"].tolist() == [0.2, 0.15]


def test_differences_by_hand(runs):
    """Gains of 1, 2 and 6: mean 3, deviation √7, and t = 4.303 at two degrees of freedom."""
    changes = differences(runs_by_precision(runs)).set_index(["precision", "setting", "measure"])
    gain = changes.loc[("bfloat16", "ε = 0.01", "win_rate")]
    half = 4.302653 * np.sqrt(7.0 / 3.0)
    assert gain[["twins", "exact", "rounded", "change"]].tolist() == [3, 60.0, 63.0, 3.0]
    assert gain[["low", "high"]].tolist() == pytest.approx([3.0 - half, 3.0 + half], rel=1e-5)
    assert changes.loc[("bfloat16", "ε = 0.01", "mean_step"), "change"] == pytest.approx(-0.2)
    wide = changes.loc[("bfloat16", "ε = 0.02", "win_rate")]
    assert wide["twins"] == 0 and np.isnan(wide["change"])
    beta = changes.loc[("bfloat16", "ε = 0.02", "beta_final")]
    assert beta["twins"] == 1 and np.isnan(beta["low"])


def test_each_arithmetic_is_held_against_its_own_exact_twins(runs):
    """More divergence by 0.1 and 0.3: mean 0.2, and t = 12.706 at one degree of freedom times a deviation of 0.1."""
    changes = differences(runs_by_precision(runs))
    settings = changes.groupby("precision", sort=False)["setting"].unique().map(list)
    assert settings.to_dict() == {"bfloat16": ["ε = 0.01", "ε = 0.02"], "bfloat16_logits": ["ε = 0.01"]}
    middle = changes[changes["precision"] == "bfloat16_logits"].set_index("measure")
    assert middle["twins"].tolist() == [2] * 4
    divergence = middle.loc["forward_kl_per_response", ["exact", "rounded", "change", "low", "high"]]
    assert divergence.tolist() == pytest.approx([1.0, 1.2, 0.2, 0.2 - 1.2706205, 0.2 + 1.2706205], rel=1e-6)
    assert (middle.loc[["mean_step", "beta_final", "win_rate"], ["change", "low", "high"]] == 0.0).all(axis=None)


def test_the_figures_show_every_arithmetic_by_its_name(runs):
    twins = runs_by_precision(runs)
    steps, changes = steps_of_twins(runs, twins), differences(twins)
    of_beta, of_changes = drawing.beta_by_precision(steps, "title"), drawing.by_precision(changes, "title")
    rounded = ["all bfloat16", "bfloat16 logits"]
    for figure, names in ((of_beta, ["exact", *rounded]), (of_changes, rounded)):
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names
    # A thin line for each run and a thick one for each mean; of the second setting there are no runs between the two.
    assert [sum(len(line.get_xdata()) > 0 for line in axes.lines) for axes in of_beta.axes] == [8 + 3, 2 + 2]
    assert [axes.get_title() for axes in of_changes.axes][2] == "KL(π_ref‖π) per response (nats)"
    assert [len(container[0].get_xdata()) for container in of_changes.axes[2].containers] == [2, 1]


def test_shares_in_training_are_means_over_runs(runs):
    table = shares_in_training(runs).set_index(["precision", "epsilon"])
    assert table["runs"].to_dict() == {
        ("bfloat16", 0.01): 3,
        ("bfloat16", 0.02): 1,
        ("bfloat16", 0.05): 1,
        ("bfloat16_logits", 0.01): 2,
        ("bfloat16_logits", 0.05): 1,
        ("float32", 0.01): 3,
        ("float32", 0.02): 1,
    }
    assert table.loc[("bfloat16", 0.01), "relaxed"] == pytest.approx(0.3)


def shares_table(ties):
    """Ties as given in bfloat16, a point fewer when sums alone are rounded, five fewer by the model."""
    rows = []
    for epsilon, tie in ties.items():
        for arithmetic, share in zip(ARITHMETICS, (0.0, 0.0, tie - 0.01, tie - 0.01, tie), strict=True):
            row = {"epsilon": epsilon, "arithmetic": arithmetic, "predicted": tie - 0.05}
            rows += [
                row | {"decision": "tied", "share": share},
                row | {"decision": "relaxed", "share": 1.0 - share, "predicted": 1.05 - tie},
            ]
    return pd.DataFrame(rows)


def test_the_answer_states_the_numbers_and_what_may_be_chance(runs):
    table = shares_table({0.01: 0.75, 0.1: 0.2})
    text = answer(table, table, differences(runs_by_precision(runs)))
    assert "100% step in float32 at ε = 0.01 and 100% at ε = 0.1; with bfloat16 logits 100% and 100%" in text
    assert "all in bfloat16 25% and 80%" in text
    assert "misses no share by more than 4 and 4 points, on these pairs and on those" in text
    assert "moves shares by up to 1 and 1. With bfloat16 logits" in text
    assert (
        "In whole runs, with `bfloat16` in place of `float32`, at ε = 0.01 β ends at 0.15 in place of 0.1 and the win "
        "rate moves by +3.0 points [-3.6, +9.6], which may be chance; "
        "at ε = 0.02 β ends at 0.1 in place of 0.1 (win rates were not judged); "
        "with `bfloat16_logits` in place of `float32`, at ε = 0.01 β ends at 0.1 in place of 0.1 and the win rate "
        "moves by +0.0 points [+0.0, +0.0], which may be chance."
    ) in text


def test_a_batch_without_twins_says_so(runs):
    dpo_only = [each for each in runs if each.experiment.method == "dpo"]
    assert [chosen.experiment.method for chosen in typical_runs(dpo_only)] == ["dpo"] * 3
    twins = runs_by_precision(dpo_only)
    assert twins.empty and shares_in_training(dpo_only).empty
    table = shares_table({0.01: 0.75})
    assert "holds no two ε-DPO runs" in answer(table, table, differences(twins))


def test_a_batch_without_a_policy_to_measure_says_so():
    with pytest.raises(ConfigError, match="no finished run of DPO or ε-DPO"):
        typical_runs([])
