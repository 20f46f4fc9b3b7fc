"""What llama.cpp's server answered for a real model, recorded and given again: what the kit made of it, it makes again.

The judge is a tiny model and a bad one, which its calibration has to say.
"""

import html
import json
import math

import pytest
from kit.chat_server import ChatServer
from kit.llama_cpp import ANSWERS, COMPARISONS, LIVE, PUBLISHED, WHILE_LOADING, everything, judge, judge_settings
from kit.recorded import Recorded

from epsdpo.evaluation import two_judges
from epsdpo.evaluation.calibration import judge_again
from epsdpo.evaluation.judge import LazyJudge
from epsdpo.evaluation.judged_before import Published
from epsdpo.evaluation.judges.comparison import Comparison, JudgeError
from epsdpo.evaluation.judges.counts import summarise

LIVE_VALUES = json.loads(LIVE.read_text(encoding="utf-8"))


@pytest.fixture
def server():
    recorded = Recorded(ANSWERS)
    with ChatServer(recorded) as server:
        yield server
    assert recorded.unknown == []


def test_all_comes_to_what_it_came_to_live(server):
    """Preferences of both modes, responses of both endpoints, and the kit's words for every refusal."""
    again = everything(server.url, server.url, server.url)
    for name, value in LIVE_VALUES.items():
        assert again[name] == (pytest.approx(value, abs=1e-12) if name in ("logprobs", "text") else value), name
    assert again.keys() == LIVE_VALUES.keys()


def test_preferences_are_those_of_the_log_probabilities_by_hand(server):
    """The tokens are m and M as such; over both orders the preference is the mean."""
    judgements = judge(server.url, COMPARISONS, mode="logprobs")
    for judgement in judgements:
        means = []
        for switched, record in judgement.records.items():
            chances = {token: math.exp(logprob) for token, logprob in record["answer"]["top_logprobs"]}
            assert chances.keys() >= {"m", "M"} and sum(chances.values()) <= 1.0
            second_wins = chances["M"] / (chances["m"] + chances["M"])
            means.append(2.0 - second_wins if switched else 1.0 + second_wins)
        assert judgement.preference == pytest.approx(sum(means) / 2.0)
    summary = summarise(judgements)
    assert summary["served_models"] == {"SmolLM2": 74}  # of 37 different comparisons
    assert summary["completion_tokens"] == 74


def test_a_server_that_still_loads_its_model_is_waited_for(server):
    (judgement,) = judge(server.url, [WHILE_LOADING])
    assert judgement.preference is not None and len(server.bodies) > 2


def test_what_nobody_recorded_is_an_error_that_names_it():
    recorded = Recorded(ANSWERS)
    with (
        ChatServer(recorded) as server,
        pytest.raises(JudgeError, match="no answer was recorded to <instruction>\na new question"),
    ):
        judge(server.url, [Comparison("a new question", "one", "two")], template=None)
    assert "a new question" in recorded.unknown[0]


@pytest.mark.parametrize("mode", ["logprobs", "text"])
def test_calibration_says_that_a_tiny_model_is_a_bad_judge(server, tmp_path, mode):
    published = Published("official", "two models", COMPARISONS, [row["preference"] for row in PUBLISHED])
    judge = LazyJudge(judge_settings(server.url, mode=mode), label_temperature=1.0, answers_dir=tmp_path)
    _, numbers = judge_again(published, judge, samples=500, seed=0)
    assert (numbers["n_scored"], numbers["n_failed"], numbers["n_both_orders"]) == (39, 0, 39)
    assert numbers["agreement"] <= numbers["chance_high"]
    assert numbers["position_bias_high"] < 0.0 and numbers["position_consistency_high"] < 0.5
    said = html.unescape(two_judges.verdict(numbers))
    assert "Nothing here shows that this judge picks the published one's winner" in said
    assert "hangs on the order more than on the outputs: it leans to the second" in said
    assert "color: #D55E00" in said
