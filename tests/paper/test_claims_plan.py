"""Claims that are looked at several times: what a plan may say, verdicts look after look, many at once, and power."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from kit.claim_runs import NO_ROUNDS
from scipy import stats

from epsdpo.batch.rounds import worlds_wanted
from epsdpo.experiment import ConfigError
from epsdpo.paper.claims import page
from epsdpo.paper.claims.multiplicity import holm
from epsdpo.paper.claims.power import chance_of_telling, smallest_told, what_it_would_take, worlds_needed
from epsdpo.paper.claims.settings import Claim, Claims, read_claims
from epsdpo.paper.claims.verdicts import (
    CANNOT_BE_TOLD,
    DOES_NOT_HOLD,
    HOLDS,
    NO_DIFFERENCE,
    as_table,
    smallest_error,
    verdict_on,
    verdicts_on,
    where_lies,
)

CONFIGS = Path(__file__).parents[2] / "configs" / "paper_mini"
LOOKS = [{"worlds": 3, "error": 0.01}, {"worlds": 5, "error": 0.04}]


def claim(**changes):
    values = {"name": "wins", "place": "Table 1", "says": "a wins", "measure": "win_rate", "of": ["a"], "above": 0.0}
    return Claim.model_validate({**values, **changes})


def plan(*claims, **changes):
    return Claims.model_validate({"worlds": 5, "first_world": 11, "looks": LOOKS, "claims": list(claims)} | changes)


def measures(effects, recipe="a", first=11):
    """Win rates of one recipe in worlds that follow on `first`."""
    return pd.DataFrame(
        [{"recipe": recipe, "world": world, "win_rate": value} for world, value in enumerate(effects, start=first)]
    )


# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"first_world": None}, "looks and first_world go together"),
        ({"looks": []}, "looks and first_world go together"),
        ({"looks": LOOKS[:1]}, r"after \[3\] worlds.*which `worlds` says are 5"),
        ({"looks": LOOKS[::-1]}, "let them grow"),
        ({"level": 0.9}, "errors sum to 0.05, but level is 0.9"),
        ({"margins": {"wons": 1.0}}, "margins: wons is no claim of this file"),
        ({"printed": {"wons": 1.0}}, "printed: wons is no claim"),
        ({"margins": {"wins": 0.0}}, "margins.wins"),
    ],
)
def test_a_plan_that_does_not_keep_its_level_is_refused_with_the_reason(tmp_path, changes, complaint):
    base, path = tmp_path / "base.yaml", tmp_path / "second.yaml"
    base.write_text(yaml.safe_dump({"worlds": 2, "claims": [claim().model_dump()]}), encoding="utf-8")
    values = {"extends": "base.yaml", "worlds": 5, "first_world": 11, "looks": LOOKS, **changes}
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=complaint) as refusal:
        read_claims(path)
    assert str(path) in str(refusal.value)


def test_the_second_round_tests_what_the_first_did_in_worlds_that_nobody_saw():
    first, second = (read_claims(CONFIGS / name) for name in ("_claims.yaml", "_claims_2.yaml"))
    assert [one.decisive() for one in second.claims] == [one.decisive() for one in first.claims]
    assert second.first_world > 10 and not first.looks
    one_sided = {one.name for one in first.claims if (one.above is None) != (one.below is None)}
    about_zero = {one.name for one in first.claims if one.name in one_sided and 0.0 in (one.above, one.below)}
    assert second.margins.keys() <= one_sided and about_zero - {"this_kit_no_slower"} <= second.margins.keys()
    # A margin as large as what the paper prints would call that no difference.
    for name, printed in second.printed.items():
        assert second.margins.get(name, 0.0) < abs(printed) or name == "step_ignores_size"


# ------------------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.9, 0.9, NO_DIFFERENCE),
        (-1.0, 0.9, CANNOT_BE_TOLD),  # the end itself is not within
        (0.1, 0.9, HOLDS),  # and of no practical size
        (-0.9, 0.0, DOES_NOT_HOLD),
        (-0.9, 1.1, CANNOT_BE_TOLD),
    ],
)
def test_what_lies_within_the_margin_makes_no_practical_difference(low, high, verdict):
    assert where_lies(low, high, 0.0, None, margin=1.0) == verdict


def test_the_first_look_that_decides_has_the_last_word():
    claims = plan(claim())
    sure, contrary = [5.0, 5.1, 5.2], [-90.0, -90.0]
    verdict = verdict_on(claims.claims[0], claims, measures(sure + contrary), NO_ROUNDS)
    assert (verdict.verdict, verdict.looked_at, len(verdict.effects), verdict.level) == (HOLDS, 3, 3, 0.99)
    half = stats.t.ppf(0.995, 2) * np.std(sure, ddof=1) / math.sqrt(3)
    assert (verdict.low, verdict.high) == (pytest.approx(5.1 - half), pytest.approx(5.1 + half))


def test_an_open_claim_is_looked_at_again_and_says_until_when():
    claims, unsure = plan(claim()), [1.0, 3.0, 9.0]
    early = verdict_on(claims.claims[0], claims, measures(unsure[:2]), NO_ROUNDS)
    assert (early.verdict, early.looked_at, early.p) == (CANNOT_BE_TOLD, 0, 1.0)
    assert early.why == "open until a look after 3 worlds"
    first = verdict_on(claims.claims[0], claims, measures(unsure), NO_ROUNDS)
    assert (first.verdict, first.looked_at) == (CANNOT_BE_TOLD, 3) and first.why.endswith("after 5 worlds")
    between = verdict_on(claims.claims[0], claims, measures([*unsure, 4.0]), NO_ROUNDS)
    assert len(between.effects) == 3 and between.effect == first.effect  # a fourth world alone is not looked at
    last = verdict_on(claims.claims[0], claims, measures([*unsure, 5.0, 5.0]), NO_ROUNDS)
    assert (last.looked_at, last.level, last.why) == (5, 0.96, "") and last.verdict == HOLDS
    spent = verdict_on(claims.claims[0], claims, measures([*unsure, -4.0, 4.0]), NO_ROUNDS)
    assert (spent.looked_at, spent.verdict, spent.why) == (5, CANNOT_BE_TOLD, "")


def test_a_world_without_an_effect_cannot_be_made_up_for():
    claims = plan(claim(minus=["b"]))
    table = pd.concat([measures([5.0, 5.1, np.nan, 5.0, 5.0]), measures([1.0] * 5, "b")])
    verdict = verdict_on(claims.claims[0], claims, table, NO_ROUNDS)
    assert verdict.verdict == CANNOT_BE_TOLD and verdict.why == "4 of 5 worlds have an effect"
    at_three = as_table([verdict_on(claims.claims[0], claims, table[table["world"] <= 13], NO_ROUNDS)])
    assert worlds_wanted(claims, at_three) == {"a": 3, "b": 3}


def test_the_time_of_a_step_is_looked_at_once():
    rows = [(name, 8, turn, seconds) for name, seconds in (("slow", 2.0), ("fast", 1.0)) for turn in (1, 2, 3)]
    rounds = pd.DataFrame(rows, columns=["contender", "length", "round", "seconds"])
    timed = claim(measure="step_cost", of=["slow"], minus=["fast"])
    verdict = verdict_on(timed, plan(timed), pd.DataFrame(), rounds)
    assert (verdict.verdict, verdict.level, verdict.why) == (HOLDS, 0.95, "")


@pytest.mark.parametrize("seed", range(30))
def test_the_smallest_error_is_that_at_which_the_interval_begins_to_decide(seed):
    generator = np.random.default_rng(seed)
    effects = generator.normal(generator.normal(), 1.0, size=int(generator.integers(2, 12)))
    above, below, margin = [(0.0, None, 0.8), (None, 0.5, None), (-1.0, 1.0, None)][seed % 3]
    p = smallest_error(effects, above, below, margin)

    def decided(error):
        half = stats.t.ppf(1 - error / 2, len(effects) - 1) * effects.std(ddof=1) / math.sqrt(len(effects))
        return where_lies(effects.mean() - half, effects.mean() + half, above, below, margin) != CANNOT_BE_TOLD

    assert 0.0 < p <= 1.0
    assert not decided(p * 0.999)
    assert p == 1.0 or decided(min(1.0, p * 1.001))


def test_effects_without_spread_are_where_they_are():
    assert smallest_error(np.array([0.02, 0.02]), 0.006, 0.01, None) == 0.0
    assert smallest_error(np.array([0.0, 0.0]), 0.0, None, 1.0) == 0.0


# ---------------------------------------------------------------------------------------------------- many claims


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]  # against 1/4, 1/3, then 0.03 > 0.05/2
    assert holm([0.01, 0.02, 0.03], 0.05) == [True, True, True]
    assert holm([], 0.05) == []


def test_verdicts_by_themselves_and_all_together_are_both_shown():
    claims = plan(claim(), claim(name="barely", of=["b"]), claim(name="open", of=["c"]))
    table = pd.concat(
        [
            measures([5.0, 5.1, 5.2]),
            measures([1.0, 3.0, 9.0, 5.0, 5.0], "b"),
            measures([1.0, -1.0, 0.5, 0.0, 0.2], "c"),
        ]
    )
    found = verdicts_on(claims, table, NO_ROUNDS)
    assert [verdict.verdict for verdict in found] == [HOLDS, HOLDS, CANNOT_BE_TOLD]
    assert [verdict.family_wise for verdict in found] == [HOLDS, CANNOT_BE_TOLD, CANNOT_BE_TOLD]
    text = page.summary(found, claims, "2026-01-01", "2026-01-02")
    assert "with Holm's correction 1, 0, 0, 2" in text
    assert "after 3 worlds (99.0%), 5 worlds (96.0%), seeds 11 to 15" in text
    assert "after 3 worlds for 1; after 5 worlds for 2." in text
    shown = page.claims_table(found)
    assert shown.count("✓ holds") == 3 and shown.count("? cannot be told") == 3 and "over 5 worlds" in shown


# ------------------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize(("distance", "worlds"), [(0.5, 15), (1.0, 9), (2.0, 4)])
def test_the_chance_of_telling_is_what_simulated_intervals_have(distance, worlds):
    draws = np.random.default_rng(3).normal(distance, 1.0, size=(20_000, worlds))
    half = stats.t.ppf(0.975, worlds - 1) * draws.std(axis=1, ddof=1) / math.sqrt(worlds)
    assert chance_of_telling(distance, 1.0, worlds, 0.95) == pytest.approx(
        (draws.mean(axis=1) - half > 0).mean(), abs=0.01
    )


def test_the_smallest_effect_is_told_four_times_in_five():
    smallest = smallest_told(1.5, 15, 0.97)
    assert chance_of_telling(smallest, 1.5, 15, 0.97) == pytest.approx(0.8)
    assert smallest_told(3.0, 15, 0.97) == pytest.approx(2 * smallest) and smallest_told(0.0, 15, 0.97) == 0.0


def test_worlds_are_as_few_as_will_do():
    needed = worlds_needed(1.0, 1.5, 0.95)
    assert chance_of_telling(1.0, 1.5, needed, 0.95) >= 0.8 > chance_of_telling(1.0, 1.5, needed - 1, 0.95)
    assert worlds_needed(0.0, 1.5, 0.95) is None and worlds_needed(1e-3, 1.5, 0.95) is None
    assert worlds_needed(1.0, 0.0, 0.95) == 2


def test_what_it_would_take_is_told_of_open_claims():
    claims = plan(
        claim(), claim(name="open", of=["b"]), claim(name="unprinted", of=["b"]), printed={"wins": 6.0, "open": 2.0}
    )
    table = pd.concat([measures([5.0, 5.1, 5.2]), measures([1.0, -1.0, 0.5, 0.0, 0.2], "b")])
    wanting = what_it_would_take(verdicts_on(claims, table, NO_ROUNDS), claims).set_index("name")
    assert list(wanting.index) == ["open", "unprinted"]
    deviation = np.std([1.0, -1.0, 0.5, 0.0, 0.2], ddof=1)
    assert wanting.loc["open", "smallest_told"] == pytest.approx(smallest_told(deviation, 5, 0.96))
    assert wanting.loc["open", "worlds_needed"] == worlds_needed(2.0, deviation, 0.95)
    assert wanting["worlds_needed"].isna().tolist() == [False, True]
    shown = page.what_it_would_take(wanting.reset_index())
    assert "2 points" in shown and shown.count("<tr>") == 3
    assert "All claims were decided" in page.what_it_would_take(what_it_would_take([], claims))
