"""Text of models, data and configs, opened in a real browser: it is read to the letter, and none of it runs."""

import pandas as pd
import pytest
from kit.hostile import ATTACKS, HOSTILE, HOSTILE_TITLE, assert_harmless

from epsdpo.evaluation.examples import examples, side_by_side


@pytest.mark.parametrize("attack", ATTACKS[:3])
def test_the_check_notices_an_attack(chromium, tmp_path, attack):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>page</title><p>{attack}</p>", encoding="utf-8")
    with pytest.raises(AssertionError, match="ran as code"):
        assert_harmless(chromium, page, attack)


def test_the_check_notices_text_that_is_not_shown(chromium, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><title>page</title><p>49 &lt;b&gt;</p>", encoding="utf-8")
    with pytest.raises(AssertionError, match="to the letter"):
        assert_harmless(chromium, page, ATTACKS[3])


def test_pages_of_a_batch_are_harmless(checkout, chromium):
    """Hostile prompts and answers in the data and the trajectory, and a hostile title in all pages but the data's."""
    data, trajectory = checkout.data_of(checkout.hostile), checkout.hostile / "trajectory"
    for folder in (data, trajectory):
        assert_harmless(chromium, folder / "notebook.html", HOSTILE)
    for folder in (trajectory, checkout.hostile / "train", checkout.hostile.parent / "report"):
        assert_harmless(chromium, folder / "notebook.html", HOSTILE_TITLE)
    assert_harmless(chromium, checkout.hostile.parent / "index.html", HOSTILE_TITLE)


def test_hostile_answers_side_by_side_are_harmless(chromium, tmp_path):
    """The table of 04_evaluate, which in the embedded world only the model's own words can reach."""
    row = {"instruction": HOSTILE, "policy_response": HOSTILE, "reference_response": HOSTILE, "policy_finished": True}
    responses = pd.DataFrame(
        [
            {**row, "reference_finished": True, "policy_gold": 1.0, "reference_gold": float(number)}
            for number in range(3)
        ]
    )
    page = tmp_path / "page.html"
    page.write_text(side_by_side(examples(responses, count=1, seed=0)), encoding="utf-8")
    assert_harmless(chromium, page, HOSTILE)
