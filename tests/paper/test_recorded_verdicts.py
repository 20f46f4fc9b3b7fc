"""What docs/paper_mini.md and README say of both rounds, against what was recorded of them."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from epsdpo.paper.claims.figure_tables import read_rounds
from epsdpo.paper.claims.power import what_it_would_take
from epsdpo.paper.claims.settings import NOT_IN_THE_PAPER, THIS_KIT, read_claims
from epsdpo.paper.claims.verdicts import (
    CANNOT_BE_TOLD,
    DOES_NOT_HOLD,
    HOLDS,
    NO_DIFFERENCE,
    as_table,
    verdicts_on,
)

ROOT = Path(__file__).parents[2]
SECOND_ROUND = ROOT / "docs" / "paper_mini" / "second_round"
# By whose claims they are, in each round: how many hold, do not hold, make no practical difference and cannot be told.
COUNTS = {
    "first": {"paper": (12, 3, 0, 20), THIS_KIT: (5, 0, 0, 1), NOT_IN_THE_PAPER: (1, 0, 0, 3)},
    "second": {"paper": (14, 3, 11, 7), THIS_KIT: (5, 0, 0, 1), NOT_IN_THE_PAPER: (0, 0, 2, 2)},
}
STAND_BY_HOLM = (8, 1, 3)  # of the paper's claims, in the second round


@pytest.fixture(scope="module")
def recorded():
    """The verdicts of both rounds as docs/paper_mini has them, by name."""
    files = {"first": SECOND_ROUND.parent / "verdicts.csv", "second": SECOND_ROUND / "verdicts.csv"}
    return {turn: pd.read_csv(file).set_index("name") for turn, file in files.items()}


def test_recorded_verdicts_follow_from_the_recorded_measures(recorded):
    """The second round's, by the claims file and today's code, to the last digits."""
    claims = read_claims(ROOT / "configs" / "paper_mini" / "_claims_2.yaml")
    measures, rounds = pd.read_csv(SECOND_ROUND / "measures.csv"), read_rounds(SECOND_ROUND / "step_cost.json")
    verdicts = verdicts_on(claims, measures, rounds)
    again = as_table(verdicts).set_index("name")
    kept = recorded["second"]
    for column in ("verdict", "family_wise", "worlds", "looked_at"):
        assert again[column].tolist() == kept[column].tolist()
    for column in ("effect", "low", "high", "p"):
        np.testing.assert_allclose(again[column], kept[column], rtol=1e-9, err_msg=column)
    wanting = what_it_would_take(verdicts, claims)
    assert wanting["name"].tolist() == pd.read_csv(SECOND_ROUND / "what_it_would_take.csv")["name"].tolist()


def test_documents_say_what_the_recorded_verdicts_come_to(recorded):
    """Counts of the paper's claims, the kit's own and open questions, and each claim's line with both verdicts."""
    claims = read_claims(ROOT / "configs" / "paper_mini" / "_claims.yaml").claims
    outcomes = [HOLDS, DOES_NOT_HOLD, NO_DIFFERENCE, CANNOT_BE_TOLD]
    for turn, table in recorded.items():
        said = table.reset_index()[["name", "place", "says"]].to_numpy().tolist()
        assert said == [[claim.name, claim.place, claim.says] for claim in claims]
        whose = table["place"].where(table["place"].isin([THIS_KIT, NOT_IN_THE_PAPER]), "paper")
        for group, counts in COUNTS[turn].items():
            assert tuple((table["verdict"][whose == group] == outcome).sum() for outcome in outcomes) == counts
    second = recorded["second"][whose == "paper"]
    assert tuple((second["family_wise"] == outcome).sum() for outcome in outcomes[:3]) == STAND_BY_HOLM

    readme, page_of_it = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/paper_mini.md"))
    for text in (readme, page_of_it):
        text = " ".join(text.split()).replace("**", "")
        assert "12 hold, 3 do not hold, 20 cannot be told" in text
        assert "14 hold, 3 do not hold, 11 no difference of practical size, 7 cannot be told" in text
    assert "8 that hold, 1 that does not, and 3 of no difference" in " ".join(page_of_it.split())
    for row in recorded["second"].itertuples():
        (line,) = [line for line in page_of_it.splitlines() if line.startswith(f"| {row.place} | {row.says} |")]
        _, _, _, effect, worlds, _, verdict, holm, first = line.rstrip(" |").split("| ")
        assert verdict[2:].strip() == row.verdict and first[2:].strip() == recorded["first"].loc[row.Index, "verdict"]
        assert (holm.strip() == "stands") == (row.family_wise == row.verdict != CANNOT_BE_TOLD)
        assert worlds.split()[0] == str(row.worlds)
        if np.isfinite(row.effect):
            shown = f"{row.effect:+.3g} [{row.low:+.3g}, {row.high:+.3g}]".replace("-", "\N{MINUS SIGN}")
            assert effect.removeprefix("≥ ").startswith(shown), row.Index
    for row in pd.read_csv(SECOND_ROUND / "what_it_would_take.csv").dropna(subset="deviation").itertuples():
        told = f"| {row.says} | {row.worlds} | {row.deviation:.3g} {row.unit} | {row.smallest_told:.3g} {row.unit} |"
        assert told in page_of_it
