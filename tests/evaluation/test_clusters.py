"""Repeated prompts and conversations of several turns are one observation, in every interval and standard error."""

import math

import numpy as np
import pandas as pd
import pytest
from kit.judged import judged
from scipy import stats

from epsdpo.evaluation import two_judges
from epsdpo.evaluation.calibration import calibrate
from epsdpo.evaluation.scores.clusters import (
    clusters_of,
    conversation_of,
    conversations_of_rendered,
    counted,
)
from epsdpo.evaluation.scores.intervals import bootstrap_interval, share_interval, standard_error
from epsdpo.evaluation.scores.length_control import GamedRows, length_control
from epsdpo.evaluation.scores.numbers import divergence_numbers, gold_numbers, preference_numbers
from epsdpo.evaluation.scores.score_file import score_file
from epsdpo.evaluation.scores.seeds import join_seeds
from epsdpo.evaluation.scores.winrate import length_controlled_win_rate, win_rate
from epsdpo.evaluation.tables import by_length_difference, by_position, by_task, what_was_asked
from epsdpo.paper.epsilon_bound import mean_bounds
from epsdpo.paper.precision import decisions as criterion_precision
from epsdpo.trajectory import summary as trajectory

# Six prompts, asked 6, 5, 3, 3, 2 and 1 times; each answer of a prompt gets the same verdict but for a little noise.
REPEATS = [6, 5, 3, 3, 2, 1]
PROMPTS = [f"prompt {letter}" for letter, times in zip("abcdef", REPEATS, strict=True) for _ in range(times)]
RATES = np.repeat([20.0, 60.0, 40.0, 10.0, 70.0, 90.0], REPEATS) + np.tile([-2.0, 2.0], 10)
DISTINCT = [f"prompt {number:02d}" for number in range(20)]


def by_hand(values, prompts, samples, seed, level=0.95):
    """Percentiles over draws of whole prompts, with loops."""
    names = list(dict.fromkeys(prompts))
    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(samples):
        drawn = [names[number] for number in generator.integers(len(names), size=len(names))]
        rows = [value for name in drawn for value, prompt in zip(values, prompts, strict=True) if prompt == name]
        estimates.append(np.mean(rows))
    return np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])


def test_whole_prompts_are_resampled():
    interval = bootstrap_interval(RATES, 2000, seed=0, prompts=PROMPTS)
    assert (interval.low, interval.high) == pytest.approx(by_hand(RATES, PROMPTS, 2000, 0))
    alone = bootstrap_interval(RATES, 2000, seed=0)
    assert interval.high - interval.low > 1.5 * (alone.high - alone.low)


def test_repeating_every_prompt_makes_no_interval_narrower():
    """Ten times the same observations say as much as one time."""
    values = np.random.default_rng(0).random(12)
    prompts = DISTINCT[:12]
    once = bootstrap_interval(values, 500, seed=0, prompts=prompts)
    often = bootstrap_interval(np.tile(values, 10), 500, seed=0, prompts=prompts * 10)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert standard_error(np.tile(values, 10), prompts * 10) == pytest.approx(standard_error(values, prompts))
    hits = values > 0.3
    often, once = share_interval(np.tile(hits, 10), prompts * 10), share_interval(hits, prompts)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)  # n - 1 of twelve


def test_numbers_of_distinct_prompts_are_those_of_before():
    """To the last digit: the same draws, and the formulas for independent values."""
    values = np.random.default_rng(1).random(20)
    generator = np.random.default_rng(7)
    means = [values[generator.integers(20, size=20)].sum() / 20.0 for _ in range(300)]
    expected = tuple(np.quantile(means, [0.025, 0.975]))
    for prompts in (None, DISTINCT):
        interval = bootstrap_interval(values, 300, seed=7, prompts=prompts)
        assert (interval.low, interval.high) == expected
        assert standard_error(values, prompts) == values.std(ddof=1) / np.sqrt(20)
        for count in (0, 7, 20):
            share = share_interval(np.arange(20) < count, prompts)
            assert (share.low, share.high) == tuple(stats.binomtest(count, 20).proportion_ci(method="wilson"))


def test_standard_error_by_hand():
    """Deviations from the mean of 3 add up to -3 and 3 in two prompts: √(2/1 · (9 + 9)) / 4."""
    assert standard_error([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "b"]) == pytest.approx(math.sqrt(36.0) / 4.0)
    assert math.isnan(standard_error([1.0, 2.0], ["a", "a"]))
    assert (
        win_rate([2.0, 1.0, None, 1.5], ["a", "b", "c", "d"]).standard_error
        == win_rate([2.0, 1.0, None, 1.5]).standard_error
    )


def test_intervals_cover_what_another_set_of_prompts_would_say():
    """Prompts are all alike in expectation, 0.5, and an answer is its prompt's but for a little noise."""
    generator = np.random.default_rng(3)
    covered = {"prompts": 0, "answers": 0, "shares": 0}
    prompts = [f"prompt {number}" for number in range(25) for _ in range(4)]
    for trial in range(200):
        values = np.repeat(generator.random(25), 4)
        for name, known in (("prompts", prompts), ("answers", None)):
            interval = bootstrap_interval(values, 200, seed=trial, prompts=known)
            covered[name] += interval.low <= 0.5 <= interval.high
        share = share_interval(values > 0.5, prompts)
        covered["shares"] += share.low <= 0.5 <= share.high
    assert 175 <= covered["prompts"] <= 198 and 180 <= covered["shares"] <= 200
    assert covered["answers"] < 150


def test_several_answers_to_one_prompt_have_no_interval():
    interval = bootstrap_interval([1.0, 2.0], 20, seed=0, prompts=["a", "a"])
    assert math.isnan(interval.low) and math.isnan(interval.high)
    one = share_interval([True, True], ["a", "a"])
    assert (one.low, one.high) == tuple(stats.binomtest(1, 1).proportion_ci(method="wilson"))


# ------------------------------------------------------------------------------------------------- what one prompt is


def test_prompts_are_told_by_their_first_user_turn():
    assert conversation_of(" what is it\n") == "what is it"
    assert conversation_of("User: what is it\n\nAssistant: a cat\n\nUser: why") == "what is it"
    assert conversation_of("System: be brief\n\nUser: what is it\n\nAssistant: a cat\n\nUser: and now") == "what is it"
    assert conversation_of("System: be brief\n\nUser: what is it") == "what is it"
    assert conversation_of("what is it\n\nAssistant: not a header here") == "what is it\n\nAssistant: not a header here"
    assert clusters_of(["b", "a", "b ", "c"], 4).tolist() == [0, 1, 0, 2]
    assert counted(["a", "a", "b"]) == "3 prompts, 2 distinct" and counted(["a", "b"]) == "2 prompts"


def test_rendered_prompts_are_told_by_what_they_continue():
    first, other = "<u>hi</u><a>", "<u>high</u><a>"
    second = f"{first}hello</a><u>why</u><a>"
    assert conversations_of_rendered([second, first, other, first]) == [first, first, other, first]
    # Nothing closes a turn of plain text: these are other questions, not later turns.
    assert conversations_of_rendered(["write a poem", "write a poem about cats"])[1] == "write a poem about cats"
    assert conversations_of_rendered(["row 1", "row 11"]) != ["row 1", "row 1"]


# ------------------------------------------------------------------------------------------------ every place of them


def responses(prompts):
    generator = np.random.default_rng(4)
    lengths = generator.integers(10, 60, (2, 20))
    return pd.DataFrame(
        {
            "prompt_id": [f"p{row}" for row in range(20)],
            "instruction": prompts,
            "task": "",
            "policy_response": ["x" * length for length in lengths[0]],
            "reference_response": ["y" * length for length in lengths[1]],
            "policy_tokens": lengths[0],
            "reference_tokens": lengths[1],
            "reverse_kl": RATES,
            "forward_kl": RATES / 3.0,
            "policy_gold": RATES,
            "reference_gold": RATES / 2.0,
            "policy_correct": RATES > 50.0,
            "reference_correct": RATES > 30.0,
            "preference": 1.0 + RATES / 100.0,
            "preference_opponent_first": 1.0 + RATES / 100.0,
            "preference_policy_first": 1.0 + RATES / 100.0,
        }
    )


def widths(numbers):
    return {
        name.removesuffix("_low"): numbers[name.removesuffix("low") + "high"] - low
        for name, low in numbers.items()
        if name.endswith("_low")
    }


def test_an_evaluation_resamples_prompts():
    def numbers(prompts):
        table = responses(prompts)
        found = preference_numbers(table, "reference", 400, 0)
        return found | divergence_numbers(table, 400, 0) | gold_numbers(table, 400, 0)

    repeated, independent = numbers(PROMPTS), numbers(DISTINCT)
    for name, width in widths(repeated).items():
        assert width > 1.2 * widths(independent)[name], name
    assert repeated["win_rate"] == independent["win_rate"]
    assert repeated["standard_error"] == pytest.approx(standard_error(RATES, PROMPTS))
    table = responses(PROMPTS)
    low, high = by_hand(RATES, PROMPTS, 400, 0)
    for rows in (by_task(table, 400, 0), by_position(table, 400, 0)):
        assert rows["low"].tolist() == pytest.approx([low] * len(rows))
        assert rows["high"].tolist() == pytest.approx([high] * len(rows))
    assert by_task(table, 20, 0)["distinct"].tolist() == [6]
    for row in by_length_difference(
        table.assign(policy_response="", reference_response=""), "reference", 400, 0
    ).itertuples():
        assert (row.low, row.high) == pytest.approx((low, high))
    assert preference_numbers(table.iloc[:6], "reference", 20, 0) == {}  # six answers to one prompt


def test_a_report_says_how_many_prompts_are_distinct():
    prompts = {"source": "file", "bos_per_prompt": 1, "left_out": {}, "duplicates": 14}
    summary = {"n_total": 20, "prompts": prompts, "judge": None, "policy_avg_length": 1, "reference_avg_length": 1}
    assert "20 prompts, 6 distinct, of file" in what_was_asked(summary | {"n_distinct": 6})
    assert "20 prompts of file" in what_was_asked(summary | {"n_distinct": 20})


def test_length_control_resamples_prompts():
    generator = np.random.default_rng(5)
    lengths = generator.integers(10, 900, (2, 20))
    gamed = GamedRows(generator.random(30), generator.normal(size=30), generator.normal(size=30))
    preferences = 1.0 + RATES / 100.0
    for control in (
        lambda prompts: length_controlled_win_rate(preferences, *lengths, 60, 0, prompts=prompts).interval,
        lambda prompts: length_control(preferences, *lengths, RATES / 50, gamed, 60, 0, 2.0, prompts=prompts).interval,
    ):
        repeated, independent = control(PROMPTS), control(DISTINCT)
        assert repeated.high - repeated.low > 1.2 * (independent.high - independent.low)
        assert control(None) == independent


def test_calibration_resamples_prompts():
    official, judged_rates = 1.0 + RATES / 100.0, 1.0 + RATES[::-1] / 100.0
    repeated = calibrate(official, judged_rates, 300, prompts=PROMPTS)
    independent = calibrate(official, judged_rates, 300, prompts=DISTINCT)
    assert calibrate(official, judged_rates, 300) == independent and independent.n_distinct == 20
    low, high = by_hand(RATES[::-1] - RATES, PROMPTS, 300, 0)
    assert (repeated.bias.interval.low, repeated.bias.interval.high) == pytest.approx((low, high))
    numbers = {"n_scored": 20, "n_total": 20, "n_distinct": 6, "official_win_rate": 1.0, "judged_win_rate": 1.0}
    measures = ("bias", "scatter", "correlation", "agreement", "chance")
    numbers |= {f"{name}{end}": 1.0 for name in measures for end in ("", "_low", "_high")} | {"n_both_orders": 0}
    assert two_judges.table(numbers)["value"].iloc[0] == "20 of 20, on 6 distinct prompts"


def turns(prompts):
    """The same prompts, each another later turn of its conversation."""
    return [f"User: {prompt}\n\nAssistant: yes\n\nUser: {row}" for row, prompt in enumerate(prompts)]


def test_files_of_judgements_resample_conversations(tmp_path):
    """A file holds each instruction once, and may hold several turns of one conversation."""
    path = tmp_path / "annotations.json"
    rows = [
        {"instruction": text, "len_1": 10 + row, "len_2": 12 + row % 3, "preference": 1.0 + rate / 100.0}
        for row, (text, rate) in enumerate(zip(turns(PROMPTS), RATES, strict=True))
    ]
    path.write_text(pd.DataFrame(rows).to_json(orient="records"))
    numbers = score_file(path, samples=300)
    assert (numbers["n_total"], numbers["n_distinct"]) == (20, 6)
    assert numbers["standard_error"] == pytest.approx(standard_error(RATES, PROMPTS))
    single = bootstrap_interval(RATES, 300, seed=0)
    assert numbers["win_rate_high"] - numbers["win_rate_low"] > 1.3 * (single.high - single.low)


def test_comparisons_of_runs_resample_conversations():
    def with_turns(annotations):
        annotations.prompts["instruction"] = turns(PROMPTS)
        return annotations

    sides = [[1.0 + rate / 100.0 for rate in RATES], [1.0 + rate / 120.0 for rate in RATES]]
    plain, conversations = [judged(side) for side in sides], [with_turns(judged(side)) for side in sides]
    alone, together = join_seeds(plain, 400, 0), join_seeds(conversations, 400, 0)
    assert (together.win_rate, together.deviation) == pytest.approx((alone.win_rate, alone.deviation))
    for kind in ("prompts_interval", "interval"):
        mine, theirs = getattr(together, kind), getattr(alone, kind)
        assert mine.high - mine.low > 1.1 * (theirs.high - theirs.low), kind


def test_shares_of_decisions_count_prompts():
    pairs = pd.DataFrame({"pair_id": [f"pair-{n}" for n in range(20)], "step": 1, "decision": [1, 0, -1, 1, 1] * 4})
    once = trajectory.decision_fractions(pairs)
    # Met again in two later epochs with the same decisions: nothing new, though there are three times as many rows.
    often = trajectory.decision_fractions(pd.concat([pairs] * 3, ignore_index=True))
    assert often["pairs"].tolist() == [60] * 3 and often["distinct"].tolist() == [20] * 3
    for end in ("low", "high"):
        assert often[end].tolist() == pytest.approx(once[end].tolist(), abs=0.01)
    texts = pd.DataFrame({"pair_id": pairs["pair_id"], "prompt": PROMPTS})
    of_prompts = trajectory.decision_fractions(trajectory.with_prompts(pairs.sort_values("decision"), texts))
    assert of_prompts["distinct"].tolist() == [6] * 3
    sorted_pairs = pairs.assign(decision=sorted(pairs["decision"]), margin=0.0)
    clustered = trajectory.decisions_by(trajectory.with_prompts(sorted_pairs, texts), "margin")
    alone = trajectory.decisions_by(sorted_pairs, "margin")
    wider = (clustered["high"] - clustered["low"]) / (alone["high"] - alone["low"])
    assert wider.max() > 1.5 and wider.min() >= 1.0  # ties are dealt out evenly among the prompts
    other_data = trajectory.with_prompts(pairs, texts.iloc[:0].assign(prompt=[]))
    assert other_data["prompt"].tolist() == pairs["pair_id"].tolist()


def test_precision_counts_a_pair_once_however_many_policies_it_was_measured_on():
    decisions = [1, 0, -1, 1, 1] * 4
    table = pd.DataFrame({"pair_id": [f"pair-{n}" for n in range(20)], "epsilon": 0.01})
    table = table.assign(**dict.fromkeys(criterion_precision.ARITHMETICS, decisions))
    chances = [f"{name} {decision}" for name in criterion_precision.ARITHMETICS for decision in trajectory.DECISIONS]
    table = table.assign(**dict.fromkeys(chances, 0.25))
    once = criterion_precision.shares(table)
    often = criterion_precision.shares(pd.concat([table] * 4, ignore_index=True))
    for end in ("low", "high"):
        assert often[end].tolist() == pytest.approx(once[end].tolist(), abs=0.01)
    assert often["distinct"].unique().tolist() == [20] and often["pairs"].unique().tolist() == [80]


def test_bounds_of_epsilon_count_prompts():
    bounds = pd.DataFrame({"step": 1, "decision": "relaxed", "bound": RATES / 100.0, "prompt": PROMPTS})
    row = mean_bounds(bounds, (0.5, 2.0), seed=0).iloc[0]
    assert (row["low"], row["high"]) == pytest.approx(tuple(by_hand(RATES / 100.0, PROMPTS, 2000, 0)))
