"""Judging through a real HTTP server on loopback, well-behaved and not: nothing is lost, nothing false is stored."""

import asyncio
import json
import logging
import math
import re
import signal
import subprocess
import sys

import pytest
from kit import chat_server
from kit.chat_judging import assert_right, comparisons, expected, good, judge_all, lines, settings_for
from kit.chat_server import ChatServer, completion, outputs, send
from kit.waiting import wait_until

from epsdpo.evaluation.judges.ask import FAILURES, JUDGEMENTS
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import Comparison, JudgeError, is_switched
from epsdpo.evaluation.judges.counts import completeness, summarise
from epsdpo.experiment import ConfigError

SECRET = "sk-never-in-a-file"


# ---------------------------------------------------------------------------------------------- a server that behaves


def test_requests_are_official_and_each_is_asked_once(tmp_path):
    items = comparisons(12)
    with ChatServer(good) as server:
        first = judge_all(items, server, tmp_path)
        again = judge_all(items[::-1], server, tmp_path)
    assert_right(first, items)
    assert_right(again, items[::-1])
    assert len(server.bodies) == 12
    for body in server.bodies:
        assert body["model"] == "judge" and body["temperature"] == 0.0
        assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 5)
        instruction = re.search(r"instruction \d+", body["messages"][1]["content"])[0]
        model_output = {item.instruction: item.model_output for item in items}[instruction]
        assert (outputs(body)[0] == model_output) == is_switched(instruction)
    switches = {is_switched(item.instruction) for item in items}
    assert switches == {True, False}


def test_record_says_what_the_server_said(tmp_path):
    items = comparisons(1)
    with ChatServer(good) as server:
        judge_all(items, server, tmp_path)
    (record,) = lines(tmp_path)
    assert record["preference"] == pytest.approx(expected(items[0]))
    assert [token for token, _ in record["answer"]["top_logprobs"]] == ["M", "m", "The"]
    assert record["usage"] == {"prompt_tokens": 100, "completion_tokens": 1}
    assert (record["judge"], record["served_model"], record["instruction"]) == ("judge", "judge-2026", "instruction 0")


def test_text_mode_is_all_or_nothing(tmp_path):
    items = comparisons(6)
    with ChatServer(good) as server:
        judgements = judge_all(items, server, tmp_path, mode="text", max_tokens=7)
    assert [item.preference for item in judgements] == [round(expected(item)) for item in items]
    assert {body["max_tokens"] for body in server.bodies} == {7}
    assert not any("logprobs" in body for body in server.bodies)


def test_both_orders_ask_only_for_the_other_one(tmp_path):
    """A judge that adds 0.7 to the log-odds of whatever is shown first has its mind changed by 0.5, not by 1.5."""
    items = [Comparison(f"instruction {row}", "5.0", output) for row, output in enumerate(["3.5", "4.5", "5.5", "6.5"])]

    def biased(body, before):
        first, second = map(float, outputs(body))
        chance = 1.0 / (1.0 + math.exp(0.7 + first - second))
        return completion("m", [("M", math.log(chance)), ("m", math.log1p(-chance))])

    with ChatServer(biased) as server:
        judge_all(items, server, tmp_path)
        assert len(server.bodies) == 4
        judgements = judge_all(items, server, tmp_path, order="both")
    assert len(server.bodies) == 8
    odds = [float(item.model_output) - 5.0 for item in items]
    shown_second = [1.0 / (1.0 + math.exp(0.7 - value)) for value in odds]
    shown_first = [1.0 / (1.0 + math.exp(-0.7 - value)) for value in odds]
    mean = [1.0 + sum(pair) / 2.0 for pair in zip(shown_first, shown_second, strict=True)]
    assert [item.preference for item in judgements] == pytest.approx(mean)
    summary = summarise(judgements)
    assert (summary["n_both_orders"], summary["position_consistency"]) == (4, 0.5)
    # Symmetric outputs: the first wins as often as the model does when it is first.
    assert summary["position_bias"] == pytest.approx(100.0 * (sum(shown_first) / 4.0 - 0.5))


def test_identical_outputs_and_repeated_comparisons_cost_nothing(tmp_path):
    items = [Comparison("same", "5.0", "5.0"), *comparisons(1), *comparisons(1)]
    with ChatServer(good) as server:
        judgements = judge_all(items, server, tmp_path)
    assert len(server.bodies) == 1
    assert judgements[0].preference == 1.5
    assert judgements[1].preference == judgements[2].preference == pytest.approx(expected(items[1]))
    summary = summarise(judgements)
    assert (summary["n_total"], summary["n_scored"], summary["n_identical"]) == (3, 3, 1)
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (100, 1)


def test_judging_works_inside_a_running_event_loop(tmp_path):
    """As in a notebook."""
    items = comparisons(2)

    async def cell():
        return judge_all(items, server, tmp_path)

    with ChatServer(good) as server:
        assert_right(asyncio.run(cell()), items)


def test_any_text_reaches_the_server_and_the_store(tmp_path):
    hostile = '"quotes", {output_2}, <|im_end|>, \u2028 and \x00'
    surrogate = hostile + " and a lone surrogate \ud800"
    items = [Comparison(hostile, surrogate, "6.0")]
    with ChatServer(lambda body, before: completion(surrogate, [("m", -0.5), (surrogate, -1.0)])) as server:
        judge_all(items, server, tmp_path)
        (judgement,) = judge_all(items, server, tmp_path)
    (body,) = server.bodies
    assert hostile in body["messages"][1]["content"] and sorted(outputs(body)) == sorted([surrogate, "6.0"])
    assert judgement.preference == (2.0 if is_switched(hostile) else 1.0)
    (record,) = judgement.records.values()
    assert record["instruction"] == hostile
    assert record["answer"]["top_logprobs"][1][0] == surrogate.replace("\ud800", "\ufffd")  # what a file can hold


def test_what_is_asked_changes_the_key(tmp_path):
    """Another model, mode, temperature or template is another question; other pacing or another address is not."""
    template = tmp_path / "judge.txt"
    template.write_text(
        '<|im_start|>user\n{instruction}\n<answer identifier="m">\n{output_1}\n</answer>'
        '<answer identifier="M">\n{output_2}\n</answer><|im_end|>\n'
    )
    changes = [
        {"model": "other"},
        {"mode": "text"},
        {"temperature": 0.5},
        {"template": str(template)},
        {"top_logprobs": 9},
    ]
    with ChatServer(good) as server, ChatServer(good) as elsewhere:
        for change in [{}, *changes]:
            judge_all(comparisons(1), server, tmp_path, **change)
        judge_all(comparisons(1), elsewhere, tmp_path, concurrency=1, max_retries=0)
    assert len(server.bodies) == 6
    assert not elsewhere.bodies
    assert len({record["key"] for record in lines(tmp_path)}) == 6
    assert server.bodies[4]["messages"][0]["content"].startswith("instruction 0\n")


def test_extra_body_adds_and_takes_out(tmp_path):
    with ChatServer(good) as server:
        extra = {"max_tokens": None, "max_completion_tokens": 1, "seed": 3}
        judge_all(comparisons(1), server, tmp_path, extra_body=extra)
    (body,) = server.bodies
    assert "max_tokens" not in body and (body["max_completion_tokens"], body["seed"]) == (1, 3)


# -------------------------------------------------------------------------------------------- a server that misbehaves

GOOD_TEXT = json.dumps({"choices": [{"message": {"content": "M"}}]})
TRANSIENT = {
    "rate limit": send("slow down", 429, Retry_After="0.05"),
    "rate limit with a past date": send("slow down", 429, Retry_After="Mon, 01 Jan 2024 00:00:00 GMT"),
    "rate limit without a word": send("", 429),
    "server error": send("<html>oops</html>", 500),
    "overload": send("", 503, Retry_After="soon"),
    "reset": chat_server.reset,
    "cut JSON": send(GOOD_TEXT[:25]),
    "cut body": chat_server.cut(GOOD_TEXT, 25),
    "a page": send("<html>login</html>"),
    "an error that calls itself 200": send('{"error": {"message": "upstream"}}'),
    "no choices": send('{"choices": []}'),
    "null": send("null"),
}


def test_everything_that_passes_is_repeated_until_it_is_right(tmp_path, caplog):
    """Each comparison meets another misbehaviour, twice; every one is judged right, and stored once."""
    items = comparisons(len(TRANSIENT))
    bad = dict(zip([item.instruction for item in items], TRANSIENT.values(), strict=True))

    def choose(body, before):
        instruction = re.search(r"instruction \d+", body["messages"][1]["content"])[0]
        return bad[instruction] if before < 2 else good(body)

    with ChatServer(choose) as server:
        assert_right(judge_all(items, server, tmp_path), items)
    assert len(server.bodies) == 3 * len(items)
    assert sum("repeated after a wait" in message for message in caplog.messages) == 6  # one for each reason
    assert len({record["key"] for record in lines(tmp_path)}) == len(lines(tmp_path)) == len(items)
    assert lines(tmp_path, FAILURES) == []


@pytest.mark.parametrize("silence", [chat_server.hang, chat_server.drip])
def test_a_request_that_never_ends_is_given_up_and_repeated(tmp_path, silence):
    items = comparisons(3)
    with ChatServer(lambda body, before: silence if before == 0 else good(body)) as server:
        assert_right(judge_all(items, server, tmp_path, timeout_seconds=0.5), items)
    assert len(server.bodies) == 6


PERMANENT = {
    "no log-probabilities": completion("m", None),
    "neither identifier among the likeliest tokens": completion("The", [("The", -0.1), ("Model", -2.0)]),
    "impossible log-probabilities": completion("m", [("m", float("nan")), ("M", -1.0)]),
    "HTTP 400": send('{"error": "context length exceeded"}', 400),
    "HTTP 500": send("", 500),
    "answer is not JSON": send("<html>"),
    "not a chat completion": send('{"choices": [{"logprobs": {"content": [{"top_logprobs": [["m", 1]]}]}}]}'),
    "HTTP 302": send("", 302, Location="/elsewhere"),
    "connection failed": chat_server.reset,
}


def test_failures_are_kept_apart_and_asked_again(tmp_path):
    items = comparisons(3 * len(PERMANENT))
    bad = {item.instruction: reply for item, reply in zip(items[::3], PERMANENT.values(), strict=True)}

    def choose(body, before):
        return bad.get(re.search(r"instruction \d+", body["messages"][1]["content"])[0]) or good(body)

    with ChatServer(choose) as server:
        judgements = judge_all(items, server, tmp_path, max_retries=1, concurrency=1)
    failed, right = judgements[::3], [row for row in range(len(items)) if row % 3]
    assert [item.failure.reason for item in failed] == list(PERMANENT)
    assert all(item.preference is None and not item.records for item in failed)
    assert_right([judgements[row] for row in right], [items[row] for row in right])
    assert len(lines(tmp_path)) == len(right)
    assert [line["reason"] for line in lines(tmp_path, FAILURES)] == list(PERMANENT)
    summary = summarise(judgements)
    assert (summary["n_total"], summary["n_scored"], summary["n_failed"]) == (27, 18, 9)
    assert completeness(summary).startswith("INCOMPLETE: 9 of 27 comparisons were not judged (")

    with ChatServer(good) as server:
        judgements = judge_all(items, server, tmp_path)
    assert_right(judgements, items)
    assert len(server.bodies) == len(PERMANENT)
    assert completeness(summarise(judgements)) == "All 27 comparisons were judged."


REASONING = [("<think>", 0.0), ("m", -16.0), ("M", -17.0)]


def test_a_judge_that_thinks_first_is_no_judge_by_log_probabilities(tmp_path):
    """Of 40 comparisons, the judge answers the first four and thinks about the others: 36 counted failures."""
    items = comparisons(40)
    answered = {item.instruction for item in items[:4]}

    def choose(body, before):
        instruction = re.search(r"instruction \d+", body["messages"][1]["content"])[0]
        return good(body) if instruction in answered else completion("<think>", REASONING)

    with ChatServer(choose) as server:
        judgements = judge_all(items, server, tmp_path, concurrency=1)
        assert len(server.bodies) == 40  # none is repeated in vain
    assert_right(judgements[:4], items[:4])
    summary = summarise(judgements)
    assert (summary["n_scored"], summary["n_failed"]) == (4, 36)
    assert "mode: text" in completeness(summary) and "enable_thinking: false" in completeness(summary)
    assert len(lines(tmp_path)) == 4 and "<think>" in lines(tmp_path, FAILURES)[0]["detail"]


def test_a_judge_that_only_thinks_is_given_up_with_the_remedy(tmp_path):
    with (
        ChatServer(lambda body, before: completion("Okay", [("Okay", -0.01), ("M", -4.7)])) as server,
        pytest.raises(JudgeError, match="first 20 requests all failed.*mode: text"),
    ):
        judge_all(comparisons(40), server, tmp_path)


def test_what_was_stored_of_such_a_judge_is_asked_again(tmp_path):
    items = comparisons(3)
    with ChatServer(good) as server:
        judge_all(items, server, tmp_path)
        stored = lines(tmp_path)
        stored[1] |= {"answer": {"top_logprobs": REASONING}, "preference": 1.27}
        (tmp_path / JUDGEMENTS).write_text("".join(json.dumps(record) + "\n" for record in stored))
        assert_right(judge_all(items, server, tmp_path), items)
        assert len(server.bodies) == 4
        assert_right(judge_all(items, server, tmp_path), items)
        assert len(server.bodies) == 4


@pytest.mark.parametrize("content", [None, "", "<think>Let me compare"])
def test_thoughts_that_were_cut_are_a_failure_with_the_remedy(tmp_path, content):
    with ChatServer(lambda body, before: completion(content, finish="length")) as server:
        judgements = judge_all(comparisons(1), server, tmp_path, mode="text")
    summary = summarise(judgements)
    assert summary["failures"] == {"answer cut at max_tokens": 1} and "max_tokens" in completeness(summary)


@pytest.mark.parametrize("text", ["Model m is better", "both", "", "m or M", "mM", "N", "<think>M"])
def test_unclear_text_is_a_failure_that_keeps_the_text(tmp_path, text):
    with ChatServer(lambda body, before: completion(text)) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path, mode="text")
    assert judgement.preference is None and judgement.failure.reason == "answer is no identifier"
    assert lines(tmp_path) == []
    assert lines(tmp_path, FAILURES)[0]["detail"] == text


def test_text_that_was_cut_is_a_failure(tmp_path):
    """The beginning of "Model m" may be an M."""
    with ChatServer(lambda body, before: completion("M", finish="length")) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path, mode="text")
    assert judgement.failure.reason == "answer cut at max_tokens"


def test_one_order_alone_is_no_judgement(tmp_path):
    item = Comparison("one", "5.0", "6.0")
    with ChatServer(lambda body, before: good(body) if outputs(body)[0] == "5.0" else send("", 400)) as server:
        (judgement,) = judge_all([item], server, tmp_path, order="both")
    assert judgement.preference is None and judgement.failure.reason == "HTTP 400"
    assert len(lines(tmp_path)) == 1


def test_retry_after_is_waited_for_by_all(tmp_path):
    """The first request is told to wait; until then no other one is repeated or begun."""

    def choose(body, before):
        return send("", 429, Retry_After="0.6") if len(server.bodies) == 1 else good(body)

    items = comparisons(3)
    with ChatServer(choose) as server:
        assert_right(judge_all(items, server, tmp_path, concurrency=1), items)
    assert len(server.times) == 4
    assert server.times[1] - server.times[0] >= 0.6


def test_a_wait_beyond_the_limit_is_a_failure(tmp_path):
    with ChatServer(lambda body, before: send("", 429, Retry_After="3600")) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path)
    assert len(server.bodies) == 1
    assert judgement.failure.reason == "HTTP 429" and "3600 s" in judgement.failure.detail


@pytest.mark.parametrize(("status", "remedy"), [(401, "api_key_env"), (403, "model"), (404, "base_url")])
def test_refusals_stop_at_once_and_never_show_the_key(tmp_path, monkeypatch, caplog, status, remedy):
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    with (
        ChatServer(lambda body, before: send(f"no such key: {SECRET}", status)) as server,
        pytest.raises(JudgeError, match=remedy) as refusal,
    ):
        judge_all(comparisons(50), server, tmp_path, api_key_env="TEST_JUDGE_KEY")
    assert len(server.bodies) <= 5
    assert all(headers["Authorization"] == f"Bearer {SECRET}" for headers in server.headers)
    files = "".join(path.read_text() for path in tmp_path.iterdir())
    assert SECRET not in str(refusal.value) + caplog.text + files


def test_the_key_is_cut_out_of_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)
    with ChatServer(lambda body, before: send(f"bad request by {SECRET}", 400)) as server:
        judge_all(comparisons(1), server, tmp_path, api_key_env="TEST_JUDGE_KEY")
    assert lines(tmp_path, FAILURES)[0]["detail"] == "bad request by ***"


def test_a_missing_key_is_told_before_any_request(monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    with ChatServer(good) as server, pytest.raises(ConfigError, match="TEST_JUDGE_KEY"):
        ChatJudge(settings_for(server, api_key_env="TEST_JUDGE_KEY"))


def test_a_judge_that_never_answers_is_given_up(tmp_path):
    with (
        ChatServer(lambda body, before: completion("m", None)) as server,
        pytest.raises(JudgeError, match="first 20 requests all failed: no log-probabilities.*Use mode: text"),
    ):
        judge_all(comparisons(100), server, tmp_path)
    # Up to one more was under way in each worker.
    assert 20 == len(lines(tmp_path, FAILURES)) <= len(server.bodies) <= 24
    assert lines(tmp_path) == []


# --------------------------------------------------------------------------------------------------- kills and locks

WORKER = """
import sys
from pathlib import Path
from kit.chat_judging import comparisons
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.ask import judge_comparisons
from epsdpo.experiment.sections.judge import JudgeSection
settings = JudgeSection(kind="chat", model="judge", base_url=sys.argv[1], concurrency=3)
judge_comparisons(comparisons(20), ChatJudge(settings), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(tmp_path, how):
    """Seven answers, then silence, then the kill, which tears one more line; the next run asks for the other 13."""
    items = comparisons(20)
    answered = []

    def choose(body, before):
        with server.lock:
            if len(answered) >= 7:
                return chat_server.hang
            answered.append(body)
        return good(body)

    with ChatServer(choose) as server:
        worker = subprocess.Popen([sys.executable, "-c", WORKER, server.url, str(tmp_path)], stderr=subprocess.PIPE)
        stored = tmp_path / JUDGEMENTS
        wait_until(lambda: stored.exists() and stored.read_bytes().count(b"\n") == 7 and len(server.bodies) == 10)
        with pytest.raises(ValueError, match=f"{JUDGEMENTS}: another process writes to it"):
            judge_all(items, server, tmp_path)
        worker.send_signal(how)
        _, said = worker.communicate(timeout=60)
    assert worker.returncode != 0
    assert how == signal.SIGKILL or b"KeyboardInterrupt" in said
    with stored.open("ab") as file:
        file.write(b'{"key": "torn", "preference": 1.9')
    with ChatServer(good) as server:
        assert_right(judge_all(items, server, tmp_path), items)
    assert len(server.bodies) == 13
    assert not [body for body in server.bodies if body in answered]
    assert len({record["key"] for record in lines(tmp_path)}) == len(lines(tmp_path)) == 20


@pytest.mark.parametrize(
    "line", ['{"key": "a"}', '{"key": "a", "preference": 2.5}', '{"key": "a", "preference": NaN}', "{", "[1]"]
)
def test_a_store_with_a_false_line_is_refused(tmp_path, line):
    (tmp_path / JUDGEMENTS).write_text('{"key": "b", "preference": 1.0}\n' + line + '\n{"key": "c", "preference": 2}\n')
    with ChatServer(good) as server, pytest.raises(ValueError, match=f"{JUDGEMENTS}, line 2"):
        judge_all(comparisons(1), server, tmp_path)
    assert not server.bodies
    assert len((tmp_path / JUDGEMENTS).read_text().splitlines()) == 3
