"""Claims: what the file may say, what a run folder keeps of it, effects and verdicts by hand-made measures."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from kit.claim_runs import NO_ROUNDS, write_run

from epsdpo.experiment import ConfigError, check_experiment
from epsdpo.experiment.sweep import recipe_and_world
from epsdpo.paper.claims import page
from epsdpo.paper.claims.bounds import bound_measures
from epsdpo.paper.claims.drawing_verdicts import all_verdicts
from epsdpo.paper.claims.effects import effects_of, extra_time, frontier_height
from epsdpo.paper.claims.fixed import fix_claims, fixed_claims
from epsdpo.paper.claims.page import claims_table
from epsdpo.paper.claims.run_table import WITHIN_TRAINING, finished_runs, first_training, measure_runs, tightened_margin
from epsdpo.paper.claims.settings import (
    Claim,
    Claims,
    check_runs,
    read_claims,
)
from epsdpo.paper.claims.verdicts import (
    CANNOT_BE_TOLD,
    DOES_NOT_HOLD,
    HOLDS,
    as_table,
    verdict_on,
    verdicts_on,
    where_lies,
)
from epsdpo.runs.layout import NOTEBOOKS


def claim(**changes):
    values = {"name": "wins", "place": "Table 1", "says": "a beats b", "measure": "win_rate", "of": ["a"], "above": 0.0}
    return Claim.model_validate({**values, **changes})


def measures(**columns):
    """Rows of worlds 1, 2, 3 of recipes a, b, …: recipe -> its win rates."""
    return pd.DataFrame(
        [
            {"recipe": recipe, "world": world, "win_rate": value}
            for recipe, values in columns.items()
            for world, value in enumerate(values, start=1)
        ]
    )


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"above": None}, "above and below are missing"),
        ({"above": 1.0, "below": 1.0}, "no effect can lie in that range"),
        ({"combine": "frontier"}, "compares win_rate of two sets"),
        ({"measure": "step_cost"}, "name one in `of`, one in `minus`"),
        ({"measure": "wins"}, "measure"),
        ({"abov": 1.0}, "abov"),
    ],
)
def test_a_claim_that_is_no_test_is_refused_with_its_place(tmp_path, changes, complaint):
    values = claim().model_dump() | changes
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"worlds": 2, "claims": [values]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint) as refusal:
        read_claims(path)
    assert str(path) in str(refusal.value) and "claims.0" in str(refusal.value)


def test_two_claims_of_one_name_are_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"worlds": 2, "claims": [claim().model_dump()] * 2}), encoding="utf-8")
    with pytest.raises(ConfigError, match="wins is the name of several"):
        read_claims(path)
    with pytest.raises(ConfigError, match="no such config file"):
        read_claims(tmp_path / "none.yaml")


def test_a_recipe_is_a_name_without_its_world():
    assert recipe_and_world("dpo-beta0.1-seed12") == ("dpo-beta0.1", 12)
    assert recipe_and_world("dpo-seed1-beta0.1") == ("dpo-seed1-beta0.1", None)


def test_runs_must_have_each_recipe_in_each_world():
    claims = Claims(worlds=2, claims=[claim(minus=["b"])], figures={"main": {"compared": ["c"]}})
    assert claims.recipes == ["a", "b", "c"]

    def experiments(*names):
        return [check_experiment({"name": name, "method": "dpo", "train": {}}, where="test") for name in names]

    check_runs(claims, experiments(*(f"{recipe}-seed{world}" for recipe in "abc" for world in (1, 2))))
    with pytest.raises(ConfigError) as refusal:
        check_runs(claims, experiments("a-seed1", "a-seed2", "b-seed1", "c"))
    text = str(refusal.value)
    assert "recipe 'b' has 1 of 2 worlds" in text and "recipe 'c' has 0 of 2 worlds" in text
    assert "recipe 'a'" not in text and "recipes here are a, b" in text


def test_the_step_cost_is_asked_of_the_benchmark_and_needs_no_runs():
    assert claim(measure="step_cost", minus=["b"]).recipes == []


def test_claims_once_fixed_may_be_reworded_but_not_changed(tmp_path):
    claims = Claims(worlds=2, claims=[claim()])
    with pytest.raises(ConfigError, match="was run with --claims"):
        fixed_claims(tmp_path)
    fix_claims(claims, tmp_path)
    fixed_at, kept = fixed_claims(tmp_path)
    assert kept == claims

    reworded = Claims(worlds=2, claims=[claim(says="a beats b, they say")], figures={"main": {"all": ["a"]}})
    fix_claims(reworded, tmp_path)
    assert fixed_claims(tmp_path) == (fixed_at, reworded)

    for changed in (
        Claims(worlds=2, claims=[claim(above=1.0)]),
        Claims(worlds=3, claims=[claim()]),
        Claims(worlds=2, level=0.9, claims=[claim()]),
        Claims(worlds=2, claims=[claim(), claim(name="more")]),
    ):
        with pytest.raises(ConfigError, match=f"fixed at {fixed_at.replace('+', '.')}.*Restore them"):
            fix_claims(changed, tmp_path)
    assert fixed_claims(tmp_path) == (fixed_at, reworded)


# -------------------------------------------------------------------------------------------------------- effects


def test_effects_are_differences_within_each_world_that_has_all_runs():
    table = measures(a=[60.0, 58.0, 70.0], b=[50.0, 52.0, np.nan], c=[54.0, 54.0, 54.0])
    assert effects_of(claim(minus=["b"]), table, NO_ROUNDS).to_dict() == {1: 10.0, 2: 6.0}
    assert effects_of(claim(of=["a", "b"], minus=["c"]), table, NO_ROUNDS).to_dict() == {1: 1.0, 2: 1.0}
    assert effects_of(claim(of=["a", "c"], minus=["b"], combine="sum"), table, NO_ROUNDS).to_dict() == {1: 64, 2: 60}
    assert effects_of(claim(of=["a", "c"], combine="range"), table, NO_ROUNDS).to_dict() == {1: 6.0, 2: 4.0, 3: 16.0}


def test_there_are_no_effects_without_runs_or_their_measure():
    assert effects_of(claim(), pd.DataFrame(), NO_ROUNDS).empty
    assert effects_of(claim(measure="tied"), measures(a=[1.0]), NO_ROUNDS).empty
    assert effects_of(claim(minus=["b"]), measures(a=[1.0]), NO_ROUNDS).empty


def curve(*points):
    return pd.DataFrame(points, columns=["forward_kl_per_response", "win_rate"])


def test_the_height_of_a_frontier_between_parallel_lines_and_where_they_do_not_meet():
    """Win rate = 50 + 10 ln KL, and 3 points above it; then only what both cover counts."""
    below = curve((1.0, 50.0), (np.e, 60.0))
    assert frontier_height(curve((np.e, 63.0), (1.0, 53.0)), below) == pytest.approx(3.0)
    assert frontier_height(curve((0.1, 0.0), (1.0, 53.0), (np.e, 63.0), (9.0, 0.0)), below) == pytest.approx(3.0)
    assert frontier_height(below, curve((np.e, 63.0), (1.0, 53.0))) == pytest.approx(-3.0)
    # Crossing in the middle: as much above as below.
    assert frontier_height(curve((1.0, 55.0), (np.e, 55.0)), below) == pytest.approx(0.0)
    assert np.isnan(frontier_height(curve((3.0, 50.0), (4.0, 60.0)), below))
    # A sampled divergence may be negative, and has no logarithm then.
    assert np.isnan(frontier_height(curve((-0.1, 50.0), (4.0, 60.0)), below))


def test_a_frontier_claim_takes_the_height_in_each_world():
    points = {"a1": (1.0, 53.0), "a2": (np.e, 63.0), "b1": (1.0, 50.0), "b2": (np.e, 60.0)}
    table = pd.DataFrame(
        [
            {
                "recipe": recipe,
                "world": world,
                "forward_kl_per_response": kl,
                "win_rate": rate + world * (recipe[0] == "a"),
            }
            for recipe, (kl, rate) in points.items()
            for world in (1, 2)
        ]
    )
    effects = effects_of(claim(of=["a1", "a2"], minus=["b1", "b2"], combine="frontier"), table, NO_ROUNDS)
    assert effects.to_dict() == {1: pytest.approx(4.0), 2: pytest.approx(5.0)}


def test_the_time_of_a_step_is_compared_within_rounds():
    rounds = pd.DataFrame(
        [("x", 8, 1, 3.0), ("x", 8, 2, 1.0), ("x", 8, 3, 9.0), ("y", 8, 1, 2.0), ("y", 8, 2, 4.0), ("z", 8, 1, 1.0)],
        columns=NO_ROUNDS.columns,
    )
    expected = {(8, 1): 50.0, (8, 2): -75.0}  # y failed in round 3
    assert extra_time(rounds, "x", "y").to_dict() == expected
    assert effects_of(claim(measure="step_cost", of=["x"], minus=["y"]), pd.DataFrame(), rounds).to_dict() == expected
    assert extra_time(NO_ROUNDS, "x", "y").empty


# ------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("low", "high", "above", "below", "verdict"),
    [
        (0.1, 2.0, 0.0, None, HOLDS),
        (0.0, 2.0, 0.0, None, CANNOT_BE_TOLD),  # the end itself is not above it
        (-1.0, 0.0, 0.0, None, DOES_NOT_HOLD),
        (-1.0, 0.1, 0.0, None, CANNOT_BE_TOLD),
        (-2.0, -0.1, None, 0.0, HOLDS),
        (0.0, 1.0, None, 0.0, DOES_NOT_HOLD),
        (-0.9, 0.9, -1.0, 1.0, HOLDS),
        (-0.9, 1.1, -1.0, 1.0, CANNOT_BE_TOLD),
        (-3.0, 3.0, -1.0, 1.0, CANNOT_BE_TOLD),
        (1.0, 3.0, -1.0, 1.0, DOES_NOT_HOLD),
        (np.nan, np.nan, 0.0, None, CANNOT_BE_TOLD),
    ],
)
def test_where_an_interval_lies(low, high, above, below, verdict):
    assert where_lies(low, high, above, below) == verdict


def test_a_verdict_by_hand():
    """Effects 1, 2, 3: mean 2, half of the interval t(2; 0.975) / √3 = 2.4841."""
    table = measures(a=[51.0, 52.0, 53.0], b=[50.0, 50.0, 50.0])
    claims = Claims(worlds=3, claims=[claim(minus=["b"]), claim(name="far", minus=["b"], above=-0.5)])
    unsure, sure = verdicts_on(claims, table, NO_ROUNDS)
    assert (unsure.effect, unsure.low, unsure.high) == (2.0, pytest.approx(-0.484138), pytest.approx(4.484138))
    assert unsure.verdict == CANNOT_BE_TOLD and unsure.why == "" and sure.verdict == HOLDS
    rows = as_table([unsure, sure]).set_index("name")
    assert rows.loc["far", ["above", "effect", "worlds", "verdict", "unit"]].tolist() == [-0.5, 2, 3, HOLDS, "points"]


def test_too_few_worlds_cannot_tell_whatever_their_interval():
    table = measures(a=[60.0, 60.1], b=[50.0, 50.0])
    claims = Claims(worlds=3, claims=[claim(minus=["b"])])
    verdict = verdict_on(claims.claims[0], claims, table, NO_ROUNDS)
    assert verdict.low > 0 and verdict.verdict == CANNOT_BE_TOLD and verdict.why.startswith("2 of 3 worlds")
    timed = claim(measure="step_cost", minus=["b"])
    assert verdict_on(timed, claims, table, NO_ROUNDS).why.startswith("0 of 3 rounds of the benchmark")


def test_claims_are_counted_by_whose_they_are_and_rounds_are_no_worlds():
    table = measures(a=[51.0, 52.0, 53.0], b=[50.0, 50.0, 50.0])
    sure, own = claim(minus=["b"], above=-9.0), claim(name="own", minus=["b"], above=-9.0, place="this kit")
    timed = claim(name="timed", measure="step_cost", of=["slow"], minus=["fast"], place="this kit")
    rows = [(name, 8, turn, seconds * turn) for name, seconds in (("slow", 2.0), ("fast", 1.0)) for turn in (1, 2, 3)]
    rounds = pd.DataFrame(rows, columns=["contender", "length", "round", "seconds"])
    claims = Claims(worlds=3, claims=[sure, own, timed])
    found = verdicts_on(claims, table, rounds)
    text = re.sub("<[^>]+>", "", page.summary(found, claims, "2026-01-01", "2026-01-02"))
    assert (
        "Of 1 claims of the paper 1 ✓ hold, 0 ✗ do not hold, 0 ≈ no difference of practical size, 0 ? cannot be told;"
        in text
    )
    assert "Of 2 claims of this kit 2 ✓ hold" in text and "leaves open" not in text
    assert page.claims_table(found).count("over 3 rounds on one machine") == 1


# -------------------------------------------------------------------------------------------------------- measures


def test_measures_of_runs_that_are_trained_and_evaluated(tmp_path):
    write_run(tmp_path, "a", 2, checkpoints=[(10, 51.0, 0.2), (20, 52.0, 0.4), (40, 55.0, 1.0)])
    write_run(tmp_path, "a", 1, epsilon=0.02, epsilon_step=0.01)
    write_run(tmp_path, "not_asked_for", 1)
    (write_run(tmp_path, "a", 3) / "evaluate" / "manifest.json").unlink()
    runs = finished_runs(tmp_path, ["a"])
    assert list(runs) == ["a-seed1", "a-seed2"]
    assert first_training(runs) == "2026-01-01T00:00:00+00:00" and first_training({}) == ""

    one, two = measure_runs(runs, tell=lambda _: None).to_dict("records")
    assert (one["recipe"], one["world"], one["title"]) == ("a", 1, "Run a")
    assert (one["epsilon"], one["epsilon_step"], two["beta"]) == (0.02, 0.01, 0.1)
    # What a config leaves out is what the trainer takes.
    assert (two["epsilon"], two["epsilon_step"], two["criterion_dtype"]) == (0.01, 0.01, "float32")
    assert (two["relaxed"], two["tied"], two["tightened"], two["mean_step"]) == (50.0, 0.0, 50.0, 0.0)
    assert (two["length_effect"], two["gold_gain"]) == (-2.0, pytest.approx(0.1))
    assert (two["first_win_rate"], two["middle_forward_kl"]) == (51.0, 0.4)
    assert np.isnan(one["first_win_rate"])
    assert two["tightened_margin"] == pytest.approx(0.1 * (0.5 - 1.0))  # β̃ times the log-ratio margins


def test_a_folder_without_a_finished_run_says_so(tmp_path):
    (write_run(tmp_path, "a", 1) / "evaluate" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds no finished run, trained and evaluated, of a recipe of its claims"):
        finished_runs(tmp_path, ["a"])


def test_bounds_early_and_late_are_weighted_by_their_pairs():
    """Early: (3 · 0.006 + 1 · 0.010) / 4; late: all checkpoints after a fifth of the epoch; ties count for nothing."""
    rows = [(0.1, "relaxed", 3, 0.006), (0.1, "tightened", 1, 0.010), (0.1, "tied", 9, np.nan)]
    rows += [(0.5, "relaxed", 2, 0.009), (1.0, "tightened", 2, 0.011)]
    table = pd.DataFrame(rows, columns=["share_of_epoch", "decision", "pairs", "bound"])
    table = table.assign(share_at_largest=[0.0, 1.0, np.nan, 0.5, 1.0], largest_epsilon=0.011)
    (row,) = bound_measures(table.assign(name="dpo-seed1", criterion_dtype="float32")).to_dict("records")
    assert (row["bound_early_float32"], row["bound_late_float32"]) == (pytest.approx(0.007), pytest.approx(0.01))
    assert row["bound_rise_float32"] == pytest.approx(0.003)
    shares = [row[f"bound_{when}_float32_at_largest"] for when in ("early", "late", "rise")]
    assert shares == pytest.approx([1 / 4, 3 / 4, 4 / 8]) and row["largest_epsilon"] == 0.011
    assert list(bound_measures(pd.DataFrame())) == ["name"]


def bound_measures_of(at_largest, measure="bound_late_float32"):
    rows = [{"recipe": "a", "world": world, measure: 0.02, "largest_epsilon": 0.02} for world in (1, 2)]
    return pd.DataFrame(rows).assign(**{f"{measure}_at_largest": at_largest})


@pytest.mark.parametrize(
    ("measure", "at_largest", "shown"),
    [
        ("bound_late_float32", [1.0, 1.0], "≥ 0.02 (largest ε tried)"),
        ("bound_early_bfloat16", [0.5, 0.0], "≥ +0.02 [+0.02, +0.02] ε (25.0% of pairs at 0.02, the largest ε tried)"),
        (
            "bound_late_bfloat16",
            [0.0, 0.0],
            "<td style='text-align: left; vertical-align: top'>+0.02 [+0.02, +0.02] ε, over 2 worlds<",
        ),
        ("bound_rise_bfloat16", [0.5, 0.5], "+0.02 [+0.02, +0.02] ε (50.0% of pairs count with 0.02, the largest ε"),
    ],
)
def test_a_bound_at_the_largest_epsilon_is_said_to_be_a_lower_limit(measure, at_largest, shown):
    claims = Claims(worlds=2, claims=[claim(measure=measure, above=0.006, below=0.01)])
    (verdict,) = verdicts_on(claims, bound_measures_of(at_largest, measure), NO_ROUNDS)
    assert verdict.verdict == DOES_NOT_HOLD  # which a lower limit above the range shows
    assert shown in claims_table([verdict])
    (row,) = as_table([verdict]).to_dict("records")
    assert row["lower_limit"] == shown.startswith("≥") and row["at_largest"] == np.mean(at_largest)
    (axes,) = all_verdicts(as_table([verdict]), "title").axes
    (point,) = [line for line in axes.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert (point.get_markerfacecolor() == "white") == row["lower_limit"]


def test_a_bound_is_asked_only_of_runs_with_a_reference_that_stays():
    claims = Claims(worlds=2, claims=[claim(measure="bound_late_float32")], figures={"bound": {"all": ["b"]}})

    def experiments(method, **model):
        values = {"method": "dpo", "train": {}}
        others = [check_experiment({**values, "name": f"a-seed{world}"}, where="test") for world in (1, 2)]
        values = {"method": method, "train": {}, "model": {"name_or_path": "m", **model}}
        return others + [check_experiment({**values, "name": f"b-seed{world}"}, where="test") for world in (1, 2)]

    check_runs(claims, experiments("epsilon_dpo"))
    for method, model in (("tr_dpo", {}), ("simpo", {}), ("dpo", {"lora": {"r": 4, "alpha": 8}})):
        with pytest.raises(ConfigError, match=f"b-seed1 is asked for its bound.*with method {method}"):
            check_runs(claims, experiments(method, **model))


@pytest.mark.parametrize(
    ("steps", "nearest"),
    [([10, 20, 30, 40], 20), ([8, 16, 24, 32, 40], 24), ([20, 40], 20), ([40], 40), ([4, 36, 40], 36), ([5, 34], 34)],
)
def test_the_middle_is_the_checkpoint_nearest_to_half_of_training(tmp_path, steps, nearest):
    """Not that in the middle of the list: of ten that is at three fifths, of two at the end."""
    write_run(tmp_path, "a", 1, steps=40, checkpoints=[(step, 50.0, float(step)) for step in steps])
    (row,) = measure_runs(finished_runs(tmp_path, ["a"]), tell=lambda _: None).to_dict("records")
    assert row["middle_forward_kl"] == nearest


def test_the_margin_of_tightened_pairs_is_of_the_second_half():
    pairs = pd.DataFrame({"step": [1, 2, 3, 3, 4], "decision": [-1, -1, -1, 1, 0], "reward_margin": [9, 9, 1, 2, 6]})
    assert tightened_margin(pairs) == 1.0 - 4.0
    assert np.isnan(tightened_margin(pairs[pairs["decision"] >= 0]))
    assert np.isnan(tightened_margin(pairs.iloc[:0]))


def test_checkpoints_are_read_where_04_leaves_them():
    cells = nbformat.read(NOTEBOOKS / "04_evaluate.ipynb", as_version=4).cells
    assert any(f'"{Path(WITHIN_TRAINING).stem}", within' in cell.source for cell in cells)
