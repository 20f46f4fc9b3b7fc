"""The whole procedure of looks on simulated claims whose truth is known: how often its verdicts are wrong."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from kit.claim_runs import NO_ROUNDS

from epsdpo.batch.rounds import worlds_wanted
from epsdpo.paper.claims.settings import Claim, Claims, read_claims
from epsdpo.paper.claims.verdicts import (
    CANNOT_BE_TOLD,
    DOES_NOT_HOLD,
    HOLDS,
    NO_DIFFERENCE,
    VERDICTS,
    as_table,
    verdicts_on,
)

PLAN = read_claims(Path(__file__).parents[2] / "configs" / "paper_mini" / "_claims_2.yaml")

FAMILIES, CLAIMS_EACH = 50, 20


def whole_procedure(effects, **test):
    """Verdicts on claims with these effects (claims, worlds), worlds added while they are open; and where each ended.

    Looks, errors and worlds are the second round's; the margin is one deviation of the effects from world to world.
    """
    names = [f"claim_{number}" for number in range(len(effects))]
    claims = Claims(
        claims=[Claim(name=name, place="", says="", measure="win_rate", of=[name], **test) for name in names],
        margins=dict.fromkeys(names, 1.0),
        **PLAN.model_dump(include={"worlds", "level", "first_world", "looks"}),
    )
    wanted, before = worlds_wanted(claims, None), {}
    while wanted != before:
        rows = [
            {"recipe": name, "world": PLAN.first_world + world, "win_rate": row[world]}
            for row, name in zip(effects, names, strict=True)
            for world in range(wanted[name])
        ]
        found = verdicts_on(claims, pd.DataFrame(rows), NO_ROUNDS)
        before, wanted = wanted, worlds_wanted(claims, as_table(found))
    return found, wanted


@pytest.fixture(scope="module")
def of_nulls():
    """The whole procedure for a thousand claims, in families, whose effects lie on the end of the claimed range."""
    effects = np.random.default_rng(19).normal(size=(FAMILIES, CLAIMS_EACH, PLAN.worlds))
    return [whole_procedure(family, above=0.0) for family in effects]


def test_of_a_thousand_null_effects_at_most_one_in_twenty_holds(of_nulls):
    found = [one for family, _ in of_nulls for one in family]
    counts = {verdict: sum(one.verdict == verdict for one in found) for verdict in VERDICTS}
    assert len(found) == 1000 and 0 < counts[HOLDS] <= 50
    assert counts[HOLDS] + counts[DOES_NOT_HOLD] <= 50  # either is wrong of an effect of 0
    assert counts[NO_DIFFERENCE] > 500


def test_worlds_are_added_for_open_claims_alone(of_nulls):
    looks = [look.worlds for look in PLAN.looks]
    ended = [(one, wanted[one.claim.name]) for family, wanted in of_nulls for one in family]
    assert {worlds for _, worlds in ended} == set(looks)
    for one, worlds in ended:
        assert worlds == one.looked_at == len(one.effects)
        assert one.verdict != CANNOT_BE_TOLD or worlds == looks[-1]


def test_after_holm_hardly_a_family_has_a_wrong_verdict(of_nulls):
    wrong = [any(one.family_wise in (HOLDS, DOES_NOT_HOLD) for one in family) for family, _ in of_nulls]
    assert sum(wrong) <= 6  # at the worst 2.5 of 50 are to be expected; more than 6 would have a chance of 1 %


def test_effects_as_large_as_the_margin_are_rarely_called_small():
    """The range begins far off, so that no other verdict comes first."""
    effects = 1.0 + np.random.default_rng(20).normal(size=(15, CLAIMS_EACH, PLAN.worlds))
    found = [one for family in effects for one in whole_procedure(family, above=0.9)[0]]
    assert sum(one.verdict == NO_DIFFERENCE for one in found) <= 15
