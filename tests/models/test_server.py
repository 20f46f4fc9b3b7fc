"""The server engine against a real server on loopback: the same answers as without it, whatever goes wrong between."""

import json

import pytest
from kit import tiny_generation as tiny
from kit.loopback import Loopback, cut, drip, send, serving

from epsdpo.experiment import ConfigError, EvaluateSection, ServerSection, check_experiment
from epsdpo.experiment.keys import check_key
from epsdpo.models.respond import kept_responses, respond
from epsdpo.models.response import GenerationError
from epsdpo.models.server import ServerEngine, served_by
from epsdpo.world.language import build_tokenizer

KEY_VARIABLE, KEY = "EPSDPO_TEST_KEY", "sk-secret-1234"
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "batch_size": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return tiny.world_prompts(tokenizer, 10)


def said(responses):
    """What a server can give; a token that is not in the text, such as padding in mid-sentence, it cannot."""
    return [(response.text, response.finished) for response in responses]


@pytest.fixture(scope="module")
def expected(tokenizer, prompts, tmp_path_factory):
    engine = tiny.local_engine(tokenizer, EvaluateSection(**GREEDY))
    with kept_responses(tmp_path_factory.mktemp("local") / "store.jsonl") as kept:
        return said(respond(prompts, engine, kept, "tiny"))


@pytest.fixture
def loopback(tokenizer):
    return Loopback(tokenizer)


@pytest.fixture
def ask(tokenizer, prompts, loopback, tmp_path, monkeypatch):
    """Ask the loopback server for every prompt; keyword arguments change the server section."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    def ask(**changes):
        with serving(loopback) as url:
            names = {"base_url": url, "policy": "tiny", "reference": "other"}
            quick = {"timeout_seconds": 20.0, "max_retries": 2, "backoff_seconds": 0.01, "api_key_env": KEY_VARIABLE}
            server = ServerSection(**{**names, **quick, **changes})
            settings = EvaluateSection(engine="server", server=server, **GREEDY)
            engine = ServerEngine(server, server.policy, tokenizer, settings, 0, {"model": "served"})
            with kept_responses(tmp_path / "store.jsonl") as kept:
                responses = respond(prompts, engine, kept, "policy")
        for response in responses:
            end = [tokenizer.eos_token_id] if response.finished else []
            assert response.token_ids == tokenizer(response.text, add_special_tokens=False)["input_ids"] + end
        return said(responses)

    ask.store = tmp_path / "store.jsonl"
    return ask


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_server_answers_as_the_model_itself(ask, loopback, prompts, expected, endpoint):
    assert ask(endpoint=endpoint) == expected
    assert set(loopback.asked.values()) == {1} and len(loopback.asked) == len({tuple(p.token_ids) for p in prompts})
    assert loopback.authorizations == {f"Bearer {KEY}"}
    assert {(body["model"], body["max_tokens"], body["top_p"]) for body in loopback.requests} == {("tiny", 12, 1.0)}
    assert len({body["seed"] for body in loopback.requests}) == len(loopback.requests)
    asked = loopback.requests[0]
    if endpoint == "completions":
        assert asked["prompt"] in [prompt.token_ids for prompt in prompts]  # tokens, to which no server adds a BOS
    else:
        assert asked["messages"] in [prompt.messages for prompt in prompts]


FAILURES = {
    "too many requests": lambda handler: send(handler, 429, b"slow down", Retry_After="0.05"),
    "server error": lambda handler: send(handler, 500, b"oops"),
    "connection closed": lambda handler: setattr(handler, "close_connection", True) or True,
    "cut off": cut,
    "truncated JSON": lambda handler: send(handler, 200, b'{"choices": [{"text": "blue", "finish_r'),
    "no choices": lambda handler: send(handler, 200, b'{"choices": []}'),
    "no text": lambda handler: send(handler, 200, b'{"choices": [{"text": null, "finish_reason": "stop"}]}'),
    "nothing": lambda handler: send(handler, 200, b'{"choices": [{"text": "", "finish_reason": "length"}]}'),
    "another reason": lambda handler: send(handler, 200, b'{"choices": [{"text": "b", "finish_reason": "error"}]}'),
    "an error with status 200": lambda handler: send(handler, 200, b'{"error": {"message": "overloaded"}}'),
    "not JSON": lambda handler: send(handler, 200, b"<html>\xff</html>"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_that_pass_are_outlived(ask, loopback, expected, failure):
    """Every prompt fails at first; what is stored is what the model says all the same."""
    loopback.misbehave = lambda handler, prompt, before: before == 0 and FAILURES[failure](handler)
    assert ask() == expected
    assert set(loopback.asked.values()) == {2}


def test_an_answer_that_drips_for_ever_is_given_up(ask, loopback, prompts, expected):
    slow = prompts[3].token_ids
    loopback.misbehave = lambda handler, prompt, before: prompt == slow and before == 0 and drip(handler, 30.0)
    assert ask(timeout_seconds=1.0) == expected


def test_half_of_an_emoji_is_kept_as_what_a_file_can_hold(ask, loopback, prompts):
    loopback.change = lambda answer: answer["choices"][0].update(text="\ud83d", finish_reason="stop")
    assert ask(endpoint="completions") == [("\ufffd", True)] * len(prompts)
    assert json.loads(ask.store.read_text(encoding="utf-8").splitlines()[0])["response"] == "\ufffd"
    assert ask(endpoint="completions") == [("\ufffd", True)] * len(prompts)


def test_prompts_that_keep_failing_are_not_stored_and_asked_again(ask, loopback, prompts, expected):
    bad = [prompts[2].token_ids, prompts[7].token_ids]
    loopback.misbehave = lambda handler, prompt, before: prompt in bad and send(handler, 503, b"not today")
    with pytest.raises(GenerationError, match="2 of 10 prompts have no response, .*503: not today"):
        ask()
    stored = [json.loads(line)["prompt_ids"] for line in ask.store.read_text(encoding="utf-8").splitlines()]
    assert len(stored) == 8 and not [ids for ids in bad if ids in stored]
    assert [loopback.asked[tuple(ids)] for ids in bad] == [3, 3]

    loopback.misbehave = lambda handler, prompt, before: False
    assert ask() == expected
    assert sum(loopback.asked.values()) == 8 + 2 * 3 + 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_failures_that_will_not_pass_end_it_at_once(ask, loopback, status):
    loopback.misbehave = lambda handler, *_: send(handler, status, f"no such thing, {KEY}".encode())
    with pytest.raises(GenerationError, match=rf"refuses the request for model 'tiny' with HTTP {status}") as error:
        ask(backoff_seconds=30.0)
    assert KEY not in str(error.value)
    assert max(loopback.asked.values()) == 1


def test_a_server_that_reads_another_prompt_is_refused(ask, loopback):
    """A server's own template or a second BOS shows in the number of tokens that it read."""

    def second_bos(answer):
        answer["usage"]["prompt_tokens"] += 1

    loopback.change = second_bos
    with pytest.raises(GenerationError, match=r"read a prompt of \d+ tokens where training's rendering has \d+"):
        ask()
    assert ask.store.read_text() == ""


def test_a_server_that_answers_as_another_model_is_refused(ask, loopback, expected):
    """One that knows a single model may answer for it under any name."""
    loopback.change = lambda answer: answer.update(model="tiny")
    assert ask() == expected
    ask.store.unlink()
    loopback.change = lambda answer: answer.update(model="model.gguf")
    with pytest.raises(GenerationError, match=r"asked for model 'tiny' and answers as 'model\.gguf'"):
        ask()
    assert ask.store.read_text() == ""


def test_nothing_of_the_distribution_is_left_out_unless_the_config_says_so(ask, loopback):
    ask()
    assert {(body["top_k"], body["min_p"]) for body in loopback.requests} == {(-1, 0.0)}
    loopback.requests.clear()
    ask.store.unlink()
    ask(extra_body={"top_k": None, "min_p": None, "add_special_tokens": False})
    fields = {"model", "prompt", "temperature", "top_p", "max_tokens", "seed", "add_special_tokens"}
    assert {frozenset(body) for body in loopback.requests} == {frozenset(fields)}


def test_what_a_config_adds_to_requests_is_part_of_what_made_a_response():
    server = {"base_url": "http://localhost/v1", "policy": "a", "reference": "b"}
    made_by = [
        served_by(ServerSection(**server, extra_body=extra), "a")
        for extra in ({}, {"top_k": None}, {"repetition_penalty": 1.0})
    ]
    fields = [found["fields"] for found in made_by]
    assert fields == [
        {"top_k": -1, "min_p": 0.0},
        {"min_p": 0.0},
        {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
    ]


def test_a_response_that_the_servers_context_cut_is_refused(ask, loopback, expected):
    """Its length would be the server's, and pass for the model's."""

    def cut_after(tokens):
        return lambda answer: (
            answer["choices"][0].update(finish_reason="length"),
            answer["usage"].update(completion_tokens=tokens),
        )

    loopback.change = cut_after(11)
    with pytest.raises(GenerationError, match="after 11, where max_new_tokens is 12.*context that holds"):
        ask()
    loopback.change = cut_after(12)
    assert [text for text, _ in ask()] == [text for text, _ in expected]


def test_the_key_is_in_no_file(ask):
    ask()
    assert KEY not in ask.store.read_text(encoding="utf-8")


def test_a_key_that_is_not_set_is_refused_before_work(ask, loopback, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match=f"api_key_env names {KEY_VARIABLE}, which is not set"):
        ask()
    assert not loopback.asked


def test_engine_and_server_section_belong_together():
    with pytest.raises(ValueError, match="engine is 'server' and `server` is missing"):
        EvaluateSection(engine="server")
    server = ServerSection(base_url="http://localhost/v1", policy="a", reference="b")
    with pytest.raises(ValueError, match="engine is 'transformers' and `server` is set"):
        EvaluateSection(server=server)


def test_the_reference_may_have_a_server_of_its_own():
    server = ServerSection(base_url="http://one/v1", policy="a", reference="b", reference_url="http://two/v1")
    assert (server.base_url, server.of_reference().base_url) == ("http://one/v1", "http://two/v1")
    with pytest.raises(ValueError, match="reference_url: 'two/v1' is no http or https address"):
        ServerSection(base_url="http://one/v1", policy="a", reference="b", reference_url="two/v1")


def test_policy_and_reference_are_two_models():
    names = {"base_url": "http://one/v1", "policy": "a", "reference": "a"}
    with pytest.raises(ValueError, match="both 'a' of one server, and would be one model"):
        ServerSection(**names)
    assert ServerSection(**names, reference_url="http://two/v1").of_reference().base_url == "http://two/v1"


def test_what_is_gone_is_refused_with_what_takes_its_place():
    with pytest.raises(ValueError, match="start `vllm serve MODEL` and use engine: server"):
        EvaluateSection(engine="vllm")
    former = {"timeout": 9.0, "attempts": 3, "backoff": 2.0}
    server = {"base_url": "http://localhost/v1", "policy": "a", "reference": "b", **former}
    values = {"name": "x", "method": "dpo", "train": {}, "evaluate": {"engine": "server", "server": server}}
    with pytest.raises(ConfigError) as error:
        check_experiment(values, "run.yaml")
    assert str(error.value).splitlines() == [
        "run.yaml: evaluate.server.timeout is called evaluate.server.timeout_seconds",
        "run.yaml: evaluate.server.attempts is called evaluate.server.max_retries, which leaves out the first attempt: "
        "one less",
        "run.yaml: evaluate.server.backoff is called evaluate.server.backoff_seconds",
    ]
    with pytest.raises(ConfigError, match=r"--set: evaluate\.server\.attempts is called evaluate\.server\.max_retries"):
        check_key("evaluate.server.attempts", "--set")
