"""The content of the interactive figure: which pairs it lists, how large it may become, and that texts stay texts."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from epsdpo.plots.interactive import beta_step_by_step, json_in_html
from epsdpo.plots.looks import FAMILIES
from epsdpo.trajectory import moved_pairs as module
from epsdpo.trajectory.moved_pairs import moved_pairs, step_by_step

ATTACK = "</script><script>alert('x')</script><!-- & \u2028 \u2029"


def record(steps, pairs_per_step):
    """Steps of pairs that are relaxed, tied and tightened in turn, with margins 0, -1, 2, -3, …"""
    rows = pd.DataFrame({"step": np.repeat(np.arange(1, steps + 1), pairs_per_step)})
    place = np.tile(np.arange(pairs_per_step), steps)
    rows["pair_id"] = [f"pair-{number}" for number in range(len(rows))]
    rows["decision"] = np.array([1, 0, -1])[place % 3]
    rows["log_ratio_margin"] = np.where(place % 2, -1.0, 1.0) * place
    rows["chosen_tokens"], rows["rejected_tokens"] = 5, 7
    betas = 0.1 * 0.99 ** np.arange(steps + 1)
    table = pd.DataFrame({"step": range(1, steps + 1), "beta_before": betas[:-1], "beta_after": betas[1:]})
    texts = pd.DataFrame({"pair_id": rows["pair_id"], "prompt": ATTACK, "chosen": "c" * 200, "rejected": "r"})
    return table, rows, texts


def test_pairs_that_moved_by_hand():
    _, pairs, _ = record(steps=2, pairs_per_step=12)
    listed = moved_pairs(pairs, at_most=5)
    # Relaxed are places 0, 3, 6, 9, tightened 2, 5, 8, 11; in turn from the largest margin in size.
    assert listed.loc[listed["step"] == 1, "pair_id"].tolist() == [f"pair-{place}" for place in (9, 11, 6, 8, 3)]
    assert listed["step"].value_counts().to_dict() == {1: 5, 2: 5}
    only_tight = moved_pairs(pairs[pairs["decision"] <= 0], at_most=3)
    assert only_tight["decision"].unique().tolist() == [-1] and len(only_tight) == 6


def test_content_by_hand():
    steps, pairs, texts = record(steps=3, pairs_per_step=13)
    content = step_by_step("run", steps, pairs, texts[texts["pair_id"] != "pair-9"])
    assert content["steps"]["relaxed"] == [5, 5, 5] and content["steps"]["tied"] == [4, 4, 4]
    assert content["steps"]["before"] == [0.1, 0.099, 0.09801] and content["steps"]["after"][0] == 0.099
    assert [len(listed) for listed in content["pairs"]] == [8, 8, 8]
    place, decision, margin, chosen, rejected = content["pairs"][0][0]
    assert (decision, margin, chosen, rejected) == (1, 12.0, 5, 7)
    assert content["texts"][place] == ["pair-12", ATTACK, "c" * 80 + "…", "r"]
    unknown = next(entry for entry in content["texts"] if entry[0] == "pair-9")
    assert unknown[1:] == ["(not in the data)"] * 3


def test_long_runs_stay_small_and_say_so(monkeypatch):
    steps, pairs, texts = record(steps=300, pairs_per_step=6)
    monkeypatch.setattr(module, "MOST_STEPS", 100)
    monkeypatch.setattr(module, "MOST_BYTES", 40_000)
    content = step_by_step("run", steps, pairs, texts)
    assert len(json.dumps(content, ensure_ascii=False).encode()) <= 40_000
    shown = content["steps"]["step"]
    assert len(shown) == 100 and shown[0] == 1 and shown[-1] == 300
    assert "100 of 300 steps" in content["note"]
    most = max(map(len, content["pairs"]))
    assert 0 < most < 4 and f"At most {most} pairs" in content["note"]


def test_no_text_can_leave_the_json():
    steps, pairs, texts = record(steps=2, pairs_per_step=3)
    content = step_by_step(ATTACK, steps, pairs, texts)
    page = beta_step_by_step(content, FAMILIES["dpo"])
    assert page.count("</script>") == 2 and page.count("<script") == 2
    embedded = re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1]
    assert not set(embedded) & set("<>&\u2028\u2029")
    assert json.loads(embedded)["title"] == ATTACK
    with pytest.raises(ValueError, match="JSON"):
        json_in_html(float("nan"))


def test_the_script_writes_texts_and_never_markup():
    """And fetches nothing: the figure is read offline."""
    script = beta_step_by_step({}, FAMILIES["dpo"])
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import("):
        assert forbidden not in script
    assert re.findall(r"https?://[^'\"]+", script) == ["http://www.w3.org/2000/svg"]  # the name of a standard
