"""What 04_evaluate shows beside its figures, on responses written by hand: positions, lengths, disagreements, heads."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest
from kit.published import GAMED

from epsdpo.evaluation.examples import disagreements, examples, side_by_side
from epsdpo.evaluation.judged_before import read_published
from epsdpo.evaluation.scores import score_file as scores
from epsdpo.evaluation.scores.annotations import InputError, write_annotations
from epsdpo.evaluation.scores.numbers import alpaca_eval_numbers, preference_numbers
from epsdpo.evaluation.tables import (
    by_length_difference,
    by_position,
    headline,
    judged_or_not,
    win_rate_and_kl,
    win_rate_table,
)
from epsdpo.evaluation.two_judges import verdict
from epsdpo.experiment import CalibrateSection
from epsdpo.plots.evaluation import preference_histogram, two_judges, win_rate_by_length
from epsdpo.plots.looks import STARTING_MODEL
from epsdpo.plots.report import win_rate_against_kl


def table(preferences, lengths, both=None, gold=None):
    """Responses of so many characters; `both` are the preferences by order, else each was shown with its own first."""
    rows = len(preferences)
    first, second = both or (preferences, [np.nan] * rows)
    frame = pd.DataFrame(
        {
            "prompt_id": [f"p{row}" for row in range(rows)],
            "instruction": [f"instruction {row}" for row in range(rows)],
            "task": "",
            "policy_response": ["x" * length for length, _ in lengths],
            "reference_response": ["y" * length for _, length in lengths],
            "preference": preferences,
            "preference_opponent_first": first,
            "preference_policy_first": second,
        }
    )
    if gold is not None:
        frame["policy_gold"], frame["reference_gold"] = zip(*gold, strict=True)
    return frame


LENGTHS = [(10, 10), (20, 10), (30, 10), (40, 10), (50, 10)]


def test_win_rate_by_position_by_hand():
    both = ([1.9, 1.7, 1.5, np.nan], [1.5, 1.3, 1.1, 1.0])
    shown = by_position(table([1.7, 1.5, 1.3, np.nan], LENGTHS[:4], both), samples=20, seed=0)
    # The last prompt has an answer in one order only: it has no preference, and is in neither rate.
    assert shown["answers"].tolist() == [3, 3]
    assert shown["win_rate"].tolist() == pytest.approx([70.0, 30.0])
    assert by_position(table([1.7, 1.5], LENGTHS[:2]), samples=20, seed=0) is None


def test_win_rate_by_length_by_hand():
    groups = by_length_difference(table([1.0, 1.25, 1.5, 1.75, 2.0], LENGTHS), "reference", samples=20, seed=0)
    assert groups["difference"].tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert groups["win_rate"].tolist() == [0.0, 25.0, 50.0, 75.0, 100.0]
    level = by_length_difference(table([1.0, 2.0, np.nan], [(10, 10)] * 3), "reference", samples=20, seed=0)
    assert level["prompts"].tolist() == [2] and level["win_rate"].tolist() == [50.0]
    win_rate_by_length(level, "title").canvas.draw()


def test_disagreements_are_with_the_gold_reward_if_there_is_one():
    responses = table([1.9, 1.9, 1.1, 1.5], LENGTHS[:4], gold=[(0.2, 0.4), (1.0, 0.1), (0.9, 0.1), (1.0, 0.0)])
    sentence, rows = disagreements(responses, "reference", gold_judges=False, count=5)
    assert "the gold reward the other" in sentence and rows["prompt_id"].tolist() == ["p2", "p0"]


def test_disagreements_are_with_the_other_order_else():
    both = ([1.9, 1.6, 1.9], [1.8, 1.4, 1.1])
    sentence, rows = disagreements(table([1.85, 1.5, 1.5], LENGTHS[:3], both), "reference", False, count=5)
    assert "changes its mind" in sentence and rows["prompt_id"].tolist() == ["p2", "p1"]
    page = side_by_side(rows)
    assert "(90 %, 10 % by order)" in page and page.index("instruction 2") < page.index("instruction 1")


def test_disagreements_are_wins_of_the_longer_response_at_last():
    responses = table([1.9, 1.6, 1.9, 1.2, np.nan], [(5, 5), (9, 5), (99, 5), (5, 50), (500, 1)])
    sentence, rows = disagreements(responses, "reference", gold_judges=True, count=2)
    assert "The longer response won" in sentence and rows["prompt_id"].tolist() == ["p2", "p3"]
    sentence, rows = disagreements(table([1.9], [(1, 9)]), "reference", gold_judges=True, count=2)
    assert sentence.endswith("There is none.") and len(rows) == 0


def test_examples_without_a_judge_are_drawn_and_long_texts_are_cut():
    responses = table([1.0] * 5, [(2000, 1)] * 5).drop(columns=["preference"])
    rows = examples(responses, count=3, seed=0)
    assert rows["chosen_as"].tolist() == ["random"] * 3
    assert side_by_side(rows).count("500 more characters") == 3


def test_a_failed_judgement_is_in_no_number_and_at_the_head():
    numbers = preference_numbers(table([2.0, 1.0, np.nan, 2.0], LENGTHS[:4]), "reference", samples=20, seed=0)
    assert numbers["win_rate"] == pytest.approx(200.0 / 3.0)
    assert preference_numbers(table([2.0, np.nan], LENGTHS[:2]), "reference", samples=20, seed=0) == {}
    summary = {"judge": "x", "n_total": 4, "n_failed": 1, "failures": {"no <b>": 1}}
    assert "INCOMPLETE: 1 of 4" in judged_or_not(summary) and "no &lt;b&gt;" in judged_or_not(summary)
    assert "All 4 comparisons" in judged_or_not(summary | {"n_failed": 0})
    assert "No judge was asked" in judged_or_not({"judge": None})


def test_lengths_that_differ_by_the_same_leave_no_length_controlled_rate():
    numbers = preference_numbers(table([2.0, 1.0, 1.4], [(40, 30)] * 3), "reference", samples=20, seed=0)
    assert "length_controlled_win_rate" not in numbers and numbers["length_control"].startswith("none: responses of")
    assert headline(numbers).index.tolist() == ["win rate (%)"]
    assert win_rate_table(numbers)["label"].tolist() == ["raw"]


def test_the_reference_stands_at_no_divergence_and_half_of_the_wins():
    keys = [f"{name}{end}" for name in ("win_rate", "reverse_kl_per_response", "forward_kl_per_response")
            for end in ("", "_low", "_high")]  # fmt: skip
    summary = {"title": "run", "against": "reference", **dict.fromkeys(keys, 60.0)}
    points = win_rate_and_kl(summary).set_index("title")
    assert points["win_rate"].to_dict() == {"the model it started from": 50.0, "run": 60.0}
    assert points.loc["the model it started from", "forward_kl_per_response_high"] == 0.0
    assert len(win_rate_and_kl(summary | {"against": "given"})) == 1
    families = {"run": "dpo", "the model it started from": STARTING_MODEL}
    figure = win_rate_against_kl(win_rate_and_kl(summary), families, "title")
    assert ["KL(π‖π_ref)" in axes.get_xlabel() for axes in figure.axes] == [True, False]
    figure.canvas.draw()


def test_alpaca_evals_length_control_is_for_its_prompts_and_opponent_alone(tmp_path, monkeypatch):
    calls = json.loads(gzip.decompress((GAMED.parents[1] / "alpaca_eval_judge.json.gz").read_bytes()))["calls"][:40]
    names = {"generator_1": "given", "generator_2": "tiny", "annotator": "judge"}
    rows = [
        {
            "instruction": call["instruction"],
            "output_1": "x" * (row % 7),
            "output_2": "x" * (row % 5),
            "preference": call["preference"],
            **names,
        }
        for row, call in enumerate(calls)
    ]
    path = tmp_path / "annotations.json"
    write_annotations(path, rows)
    instructions = pd.Series([row["instruction"] for row in rows])
    assert alpaca_eval_numbers(path, instructions, "reference", samples=2) == {}
    assert alpaca_eval_numbers(path, pd.concat([instructions, pd.Series(["mine"])]), "given", samples=2) == {}
    monkeypatch.setattr(scores, "hub_file", lambda: GAMED)
    numbers = alpaca_eval_numbers(path, instructions, "given", samples=2)
    expected = scores.score_file(path, GAMED, samples=2)
    assert numbers["length_control"] == "AlpacaEval 2" and numbers["C"] == expected["C"]
    assert numbers["length_controlled_win_rate"] == expected["length_controlled_winrate"]
    assert numbers["length_only_win_rate"] == expected["length_only_winrate"]

    def offline():
        raise OSError("no network")

    monkeypatch.setattr(scores, "hub_file", offline)
    assert "no network" in alpaca_eval_numbers(path, instructions, "given", samples=2)["length_control_missing"]


# --------------------------------------------------------------------------------------------- published judgements


def published_rows():
    names = {"generator_1": "reference", "generator_2": "model", "annotator": "official"}
    return [
        {"instruction": f"do {row}", "output_1": "a" * row, "output_2": "b" * (row + 1), "preference": 1.5, **names}
        for row in range(6)
    ]


def test_published_comparisons_come_from_annotations_or_from_outputs(tmp_path):
    rows = published_rows()
    whole, reduced = tmp_path / "annotations.json", tmp_path / "reduced.json.gz"
    write_annotations(whole, rows)
    lengths = [{**row, "len_1": len(row["output_1"]), "len_2": len(row["output_2"])} for row in rows]
    write_json_gz(reduced, [{key: row[key] for key in row if not key.startswith("output")} for row in lengths])
    for name, key in (("reference", "output_1"), ("outputs", "output_2")):
        outputs = [{"instruction": row["instruction"], "output": row[key]} for row in reversed(rows)]
        write_json_gz(tmp_path / f"{name}.json", outputs)
    first = read_published(CalibrateSection(annotations=str(whole)), seed=0)
    section = CalibrateSection(
        annotations=str(reduced),
        outputs=str(tmp_path / "outputs.json"),
        reference_outputs=str(tmp_path / "reference.json"),
    )
    assert read_published(section, seed=0) == first and first.judge == "official"
    assert [comparison.model_output for comparison in first.comparisons] == [row["output_2"] for row in rows]
    few = read_published(section.model_copy(update={"max_prompts": 3}), seed=1)
    assert len(few.comparisons) == len(few.preferences) == 3
    assert few == read_published(section.model_copy(update={"max_prompts": 3}), seed=1)
    with pytest.raises(InputError, match="holds no `output_2`.*calibrate_with.outputs"):
        read_published(section.model_copy(update={"outputs": None}), seed=0)
    # Another model's outputs under the same instructions.
    swapped = section.model_copy(update={"outputs": section.reference_outputs})
    with pytest.raises(InputError, match="'do 0' has 0 characters, the judged one had 1"):
        read_published(swapped, seed=0)


def write_json_gz(path, value):
    content = json.dumps(value).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_figures_of_a_judge_draw_what_was_judged():
    axes = preference_histogram(table([1.0, 1.99, np.nan], LENGTHS[:3])).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 2
    points = pd.DataFrame({"official": [1.2, 1.6, math.nan], "judged": [1.4, math.nan, 1.9]})
    assert two_judges(points, "title").axes[0].collections[0].get_offsets()[0].tolist() == pytest.approx([20.0, 40.0])


def test_a_judge_that_can_judge_is_not_marked_and_failures_are():
    good = {"n_failed": 0, "n_scored": 40, "agreement": 80.0, "chance": 50.0, "chance_low": 35.0, "chance_high": 65.0}
    good |= {"n_both_orders": 40, "position_bias": 5.0, "position_consistency": 0.9, "position_consistency_high": 0.96}
    assert "<b" not in verdict(good) and "the same in 80.0 % of 40" in verdict(good)
    assert "In 10 % of 40 the winner is another one" in verdict(good)
    failed = good | {"n_failed": 2, "n_total": 42, "failures": {"no text": 2}}
    assert "INCOMPLETE: 2 of 42 comparisons were not judged (no text: 2)" in verdict(failed)
    first = verdict(good | {"position_consistency_high": 0.4})
    assert "it leans to the first" in first and "deserve no trust" not in first
    assert "it leans to" not in verdict(good | {"n_both_orders": 0, "agreement": 65.0})
    assert "deserve no trust" in verdict(good | {"agreement": 65.0})
