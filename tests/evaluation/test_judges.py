"""What judging computes without asking anybody: the official protocol on published answers, prompts, keys, numbers."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from epsdpo.evaluation.calibration import calibrate
from epsdpo.evaluation.judges.answers import (
    SMALLEST_MASS,
    second_wins_by_logprobs,
    second_wins_by_rewards,
    second_wins_by_text,
    still_an_answer,
)
from epsdpo.evaluation.judges.ask import judge_comparisons
from epsdpo.evaluation.judges.comparison import Answer, Comparison, Judgement, Presentation, is_switched
from epsdpo.evaluation.judges.cost import cost_of, estimate, estimate_text
from epsdpo.evaluation.judges.counts import annotations, completeness, summarise
from epsdpo.evaluation.judges.gold import GoldJudge
from epsdpo.evaluation.judges.template import load_template, parse_template
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.response import Failure
from epsdpo.world.language import render, sample_instructions

PUBLISHED = Path(__file__).parents[1] / "data" / "alpaca_eval_judge.json.gz"
CHAT = {"kind": "chat", "model": "judge", "base_url": "http://127.0.0.1:1/v1"}


@pytest.fixture(scope="module")
def published():
    return json.loads(gzip.decompress(PUBLISHED.read_bytes()))


# --------------------------------------------------------------------------------------------- the official protocol


def test_order_and_preference_are_those_of_the_official_judge(published):
    assert len(published["calls"]) == 298
    for call in published["calls"]:
        presentation = Presentation(Comparison(call["instruction"], "a", "b"), is_switched(call["instruction"]))
        assert presentation.switched == call["is_switched"]
        found = presentation.preference(second_wins_by_logprobs(call["top_logprobs"]))
        assert found == pytest.approx(call["preference"], abs=1e-6)


def test_log_probabilities_by_hand():
    third = [("M", math.log(0.2)), ("m", math.log(0.4)), ("The", -1.0)]
    assert second_wins_by_logprobs(third) == pytest.approx(1.0 / 3.0)
    assert second_wins_by_logprobs([("M", -0.5), ("The", -1.0)]) == 1.0
    assert second_wins_by_logprobs([("m", -0.1)]) == 0.0
    assert second_wins_by_logprobs([("The", -0.1), ("mM", -2.0)]) is None
    assert second_wins_by_logprobs([]) is None
    assert second_wins_by_logprobs([("m", -math.inf), ("M", -math.inf)]) is None


@pytest.mark.parametrize(
    "top",
    [
        [("<think>", 0.0), ("m", -16.0)],
        [("<think>", 0.0), ("m", -16.0), ("M", -17.0)],
        [("Okay", -0.01), ("M", -4.7), ("m", -6.0)],
        [("m", -9999.0), ("M", -9999.0)],
        [("The", -0.7), ("m", -1.5), ("M", -1.6)],
    ],
)
def test_what_is_left_for_the_identifiers_is_no_answer(top):
    """The likeliest word of the judge begins a thought or a sentence; nothing was said of the outputs."""
    assert second_wins_by_logprobs(top) is None
    assert not still_an_answer({"top_logprobs": top})
    assert not still_an_answer(
        {"logprobs": {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}}
    )


def test_official_answers_are_far_from_that(published):
    """In 298 answers both identifiers together have 0.99 at least, so that none becomes a failure."""
    for call in published["calls"]:
        mass = sum(math.exp(logprob) for token, logprob in call["top_logprobs"] if token.strip() in ("m", "M"))
        assert mass > 0.99 > SMALLEST_MASS
        assert still_an_answer({"top_logprobs": call["top_logprobs"]})
    for other in ("m", None, [], {"rewards": [1.0, 2.0]}, {"text": "M"}, {"top_logprobs": [["1", -9.0], ["2", -0.1]]}):
        assert still_an_answer(other)


@pytest.mark.parametrize("spaced", [" M", "\u2581M", "\u0120M", "M\n"])
def test_tokens_that_differ_by_space_are_one_answer(spaced):
    top = [("M", math.log(0.1)), ("m", math.log(0.4)), (spaced, math.log(0.3))]
    assert second_wins_by_logprobs(top) == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["M", " M\n", '"M"', "**M**", "`M`.", "(M)", "<think>m? No: M.</think>\n\nM"])
def test_text_that_is_an_answer(text):
    assert second_wins_by_text(text) == 1.0
    assert second_wins_by_text(text.replace("M", "m")) == 0.0


@pytest.mark.parametrize("text", ["", "M is better", "Model M", "m M", "x<think></think>M", "<think>M", "Μ", "MM"])
def test_text_that_is_none(text):
    """The capital Greek mu among them only looks like an M."""
    assert second_wins_by_text(text) is None


def test_switching_turns_preference_and_outputs_round():
    comparison = Comparison("q", "reference", "model")
    plain, switched = Presentation(comparison, False), Presentation(comparison, True)
    assert (plain.first, plain.second) == (switched.second, switched.first) == ("reference", "model")
    assert (plain.preference(0.9), switched.preference(0.9)) == (pytest.approx(1.9), pytest.approx(1.1))


# ------------------------------------------------------------------------------------------------------- the template


def test_default_template_labels_the_outputs_as_read():
    """m is the first output and M the second, in the order in which answers are read."""
    messages = load_template(None).fill(Presentation(Comparison("QUESTION", "FIRST", "SECOND"), False))
    assert [message["role"] for message in messages] == ["system", "user"]
    text = messages[1]["content"]
    positions = [text.index(part) for part in ("QUESTION", 'identifier="m"', "FIRST", 'identifier="M"', "SECOND")]
    assert positions == sorted(positions)


def test_a_template_is_filled_once():
    template = parse_template(
        '<|im_start|>user\n{"a": """{instruction}""", {other}} {output_1}|{output_2}<|im_end|>\n', "test"
    )
    comparison = Comparison("{output_1} \\1", "{output_2} <|im_end|>", "{instruction}")
    (message,) = template.fill(Presentation(comparison, False))
    assert message["content"] == (
        '{"a": """{output_1} \\1""", {other}} {output_2} <|im_end|>|{instruction}'
    )  # what stands in a text stays there


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{instruction} {output_1} {output_2}", "is in no message"),
        ("<|im_start|>user\n{instruction} {output_1}<|im_end|>", "no place for {output_2}"),
        ("", "no place for {instruction}, {output_1}, {output_2}"),
        (
            "<|im_start|>user\n{instruction} {output_1} {output_2}<|im_end|><|im_start|>assistant\nSo:<|im_end|>",
            "the last message is the assistant's",
        ),
    ],
)
def test_templates_that_cannot_be_used(tmp_path, text, complaint):
    path = tmp_path / "judge.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as error:
        load_template(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------------ settings and money


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"kind": "gold", "model": "x"}, "model: no effect on a judge of kind 'gold'"),
        ({"kind": "reward_model", "model": "x", "order": "both"}, "order: no effect"),
        ({"kind": "causal_lm"}, "model: a judge of kind 'causal_lm' needs one"),
        ({"kind": "chat", "model": "x"}, "base_url: a judge of kind 'chat' needs one"),
        ({**CHAT, "base_url": "127.0.0.1/v1"}, "no http or https address"),
        ({**CHAT, "input_price": 1.0}, "give both, or neither"),
        ({**CHAT, "concurency": 3}, "Extra inputs are not permitted"),
        ({**CHAT, "concurrency": "3"}, "valid integer"),
    ],
)
def test_settings_that_cannot_be_meant(values, complaint):
    with pytest.raises(ValidationError, match=complaint):
        JudgeSection(**values)


@pytest.mark.parametrize("address", ["https://me:secret@host/v1", "https://host/v1?key=secret"])
def test_an_address_with_a_key_is_refused_without_repeating_it(address):
    with pytest.raises(ValidationError, match="api_key_env") as error:
        JudgeSection(**{**CHAT, "base_url": address})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("values", [{}, CHAT, {"kind": "reward_model", "model": "x", "batch_size": 2}])
def test_settings_survive_being_written_with_all_defaults(values):
    section = JudgeSection(**values)
    assert JudgeSection(**section.model_dump()) == section


def test_every_key_has_a_source():
    for key in JudgeSection.model_fields.values():
        assert key.description.rstrip().endswith("]")


def test_estimate_by_hand():
    settings = JudgeSection(**CHAT, mode="text", max_tokens=10, concurrency=2, input_price=2.0, output_price=8.0)
    bodies = [{"messages": [{"content": "x" * 400}, {"content": "é" * 200}]}] * 3
    expected = estimate(bodies, settings)
    assert (expected.requests, expected.prompt_tokens, expected.completion_tokens) == (3, 600, 30)
    assert expected.cost == pytest.approx((600 * 2.0 + 30 * 8.0) / 1e6)
    assert expected.seconds == 3.0
    assert estimate(bodies, JudgeSection(**CHAT)).completion_tokens == 3
    assert "no prices given" in estimate_text(estimate(bodies, JudgeSection(**CHAT)))
    assert cost_of(1_000_000, 500_000, settings) == 6.0


# ------------------------------------------------------------------------------------------------------------ results


def test_gold_judge_in_the_shape_of_the_others():
    instruction = render(sample_instructions(1, 0, "prompts")[0])
    items = [Comparison("count up from 1 to 3", "1 2", "1 2 3"), Comparison(instruction, "same", "same")]
    judgements = judge_comparisons(items, GoldJudge(0.25))
    rewards = judgements[0].records[False]["answer"]["rewards"]
    assert judgements[0].preference == pytest.approx(1.0 + second_wins_by_rewards(*rewards, 0.25)) and rewards[1] == 1.0
    assert judgements[1].preference == 1.5
    rows = annotations(items, judgements, "gold", "run")
    assert [row["preference"] for row in rows] == [item.preference for item in judgements]
    assert (rows[0]["output_1"], rows[0]["output_2"], rows[0]["generator_2"]) == ("1 2", "1 2 3", "run")


class SilentJudge(GoldJudge):
    """Loses every second presentation."""

    def answers(self, presentations, missing):
        yield from list(super().answers(presentations, missing))[::2]


def test_what_a_judge_loses_is_counted():
    items = [Comparison("count up from 1 to 3", "1 2", f"1 2 3 {row}") for row in range(4)]
    summary = summarise(judge_comparisons(items, SilentJudge(0.25)))
    assert (summary["n_total"], summary["n_scored"], summary["failures"]) == (4, 2, {"never answered": 2})
    assert "INCOMPLETE: 2 of 4" in completeness(summary)


class OverflowingJudge(GoldJudge):
    """One of half precision whose rewards have no difference: ∞ - ∞."""

    def answers(self, presentations, missing):
        yield {number: Answer(math.nan, {"rewards": [math.inf, math.inf]}) for number in range(len(presentations))}


def test_a_number_that_is_none_is_a_failure():
    items = [Comparison("count up from 1 to 3", "1 2", "1 2 3")]
    summary = summarise(judge_comparisons(items, OverflowingJudge(0.25)))
    assert (summary["n_scored"], summary["failures"]) == (0, {"not a finite number": 1})
    assert completeness(summary).endswith("Use dtype: float32.")


def judged(plain, switched):
    """A judgement in both orders, as the store has it."""
    records = {}
    for order, value in ((False, plain), (True, switched)):
        key = f"{plain}-{switched}-{order}"
        records[order] = {
            "key": key, "preference": value, "answer": {}, "usage": {}, "served_model": None, "time": f"2026-{order}"
        }  # fmt: skip
    return Judgement((plain + switched) / 2.0, records)


def test_order_effects_by_hand():
    """First wins: 0.5, 0.5 | 0.9, 0.9 | 0.2, 0.7: mean 0.6167; only the middle one changes its mind."""
    judgements = [judged(1.5, 1.5), judged(1.1, 1.9), judged(1.8, 1.7), Judgement(None, {}, Failure("timeout"))]
    summary = summarise(judgements)
    assert summary["position_bias"] == pytest.approx(100.0 * (3.7 / 6.0 - 0.5))
    assert summary["position_consistency"] == pytest.approx(2.0 / 3.0)
    assert summary["n_both_orders"] == 3
    assert summarise(judgements[3:])["position_bias"] is None


# ------------------------------------------------------------------------------------------------------- calibration


def test_calibration_by_hand():
    result = calibrate([1.0, 1.2, 1.5, 2.0, None], [1.1, 1.6, 1.5, 1.5, 1.9], samples=50)
    differences = np.array([0.1, 0.4, 0.0, -0.5])
    assert (result.n_total, result.n_scored) == (5, 4)
    assert result.official_win_rate == pytest.approx(42.5) and result.judged_win_rate == pytest.approx(42.5)
    assert result.bias.value == pytest.approx(0.0, abs=1e-12)
    assert result.scatter.value == pytest.approx(100.0 * math.sqrt((differences**2).sum() / 3.0))
    # Agrees on the first, differs on the second, both draw on the third, one draws on the fourth.
    assert result.agreement.value == pytest.approx(100.0 * (1.0 + 0.0 + 1.0 + 0.5) / 4.0)
    expected = np.corrcoef([1.0, 1.2, 1.5, 2.0], [1.1, 1.6, 1.5, 1.5])[0, 1]
    assert result.correlation.value == pytest.approx(expected)


def test_a_judge_that_is_the_official_one_calibrates_to_nothing(published):
    official = [row["preference"] for row in published["comparisons"]]
    same = calibrate(official, official, samples=200)
    assert same.bias.value == same.scatter.value == 0.0
    assert same.correlation.value == pytest.approx(1.0) and same.agreement.value == 100.0
    opposite = calibrate(official, [3.0 - value for value in official], samples=200)
    assert opposite.correlation.value == pytest.approx(-1.0) and opposite.agreement.value == 0.0
    halved = calibrate(official, [1.0 + (value - 1.0) / 2.0 for value in official], samples=200)
    assert halved.bias.value == pytest.approx(-same.official_win_rate / 2.0)


def test_calibration_intervals_cover_what_they_should():
    """Of 200 judges with a bias of 5 points, about 95 % have an interval that contains it."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        official = generator.uniform(1.2, 1.7, size=60)
        result = calibrate(official, official + 0.05 + generator.uniform(-0.2, 0.2, size=60), samples=200, seed=trial)
        covered += result.bias.interval.low <= 5.0 <= result.bias.interval.high
    assert 180 <= covered <= 198


def test_chance_by_hand():
    """Two of three prompts are the model's by both: of six deals two agree on all three, four on one."""
    by_chance = calibrate([2.0, 2.0, 1.0], [1.9, 1.8, 1.4], samples=3000).chance
    assert by_chance.value == pytest.approx(100.0 * (2.0 + 4.0 / 3.0) / 6.0, abs=1.5)
    assert (by_chance.interval.low, by_chance.interval.high) == pytest.approx((100.0 / 3.0, 100.0))
    # Both about one conversation: its answers stay together, so that there is nothing to deal.
    alone = calibrate([2.0, 1.0], [1.9, 1.4], prompts=["one", "one"]).chance
    assert (alone.value, alone.interval.low, alone.interval.high) == (100.0, 100.0, 100.0)


def test_a_judge_that_draws_lots_is_told_from_one_that_can_judge():
    """However often both prefer the model: about one in 40 that know nothing agrees more than chance has it."""
    generator = np.random.default_rng(1)
    lucky, trusted = 0, 0
    for trial in range(120):
        official, lots = 1.0 + (generator.random((2, 60)) < (0.1, 0.5, 0.8)[trial % 3])
        knows = np.where(generator.random(60) < 0.8, official, lots)
        by_lot, by_knowledge = (calibrate(official, judged, 100, seed=trial) for judged in (lots, knows))
        lucky += by_lot.agreement.value > by_lot.chance.interval.high
        trusted += by_knowledge.agreement.value > by_knowledge.chance.interval.high
    assert lucky <= 7  # of 120, where a share of 1/40 has more once in 90
    assert trusted >= 108


def test_calibration_is_repeatable_and_refuses_what_does_not_fit():
    official, other = [1.0, 1.5, 2.0], [1.1, 1.9, 1.6]
    assert calibrate(official, other, 50, seed=3) == calibrate(official, other, 50, seed=3)
    assert calibrate(official, other, 50, seed=3).bias.interval != calibrate(official, other, 50, seed=4).bias.interval
    with pytest.raises(ValueError, match="must belong together"):
        calibrate([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="1 of 2 are"):
        calibrate([1.0, 2.0], [None, 2.0])
    with pytest.raises(ValueError, match=r"preference 2.5 is outside"):
        calibrate([1.0, 2.0], [1.0, 2.5])
