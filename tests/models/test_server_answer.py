"""Whatever a server sends: text, JSON or a counted failure, and the key in none of them. Judge and generation alike."""

import base64
import functools
import gzip
import html
import json
import logging
import re
import urllib.parse
import zlib

import pytest
from kit import tiny_generation as tiny
from kit.chat_judging import assert_right, comparisons, good, judge_all, lines, settings_for
from kit.chat_server import ChatServer, completion, send
from kit.loopback import Loopback, serving
from kit.loopback import send as send_raw

from epsdpo.evaluation.judges.ask import FAILURES
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import JudgeError
from epsdpo.evaluation.judges.counts import summarise
from epsdpo.experiment import ConfigError, EvaluateSection, ServerSection
from epsdpo.models.api_key import ApiKey
from epsdpo.models.hub import commit_of
from epsdpo.models.respond import kept_responses, respond
from epsdpo.models.response import GenerationError
from epsdpo.models.server import ServerEngine
from epsdpo.models.server_answer import LARGEST_BYTES
from epsdpo.world.language import build_tokenizer

VARIABLE = "EPSDPO_TEST_KEY"
KEY = 'sk-Proj/a+b="9\\z&x<secret>'


def chunks(*parts):
    """A body in chunks, of which the last may break the rules of chunks."""

    def reply(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in parts:
            handler.wfile.write(part)
        handler.close_connection = True

    return reply


@functools.cache
def zeros(times):
    """A quarter of a gigabyte of zeros, packed so often."""
    packer = zlib.compressobj(wbits=31)
    content = b"".join([packer.compress(bytes(2**22)) for _ in range(2**6)] + [packer.flush()])
    for _ in range(times - 1):
        content = gzip.compress(content, mtime=0)
    return content


def bomb(encodings):
    return lambda handler: send(zeros(encodings.count("gzip")), Content_Encoding=encodings)(handler)


def with_choice(**changes):
    choice = {"message": {"role": "assistant", "content": "m"}, "logprobs": None, "finish_reason": "stop", **changes}
    return {"choices": [choice]}


def with_logprob(number):
    """As text, since Python would not write such numbers."""
    top = f'[{{"token": "m", "logprob": {number}}}, {{"token": "M", "logprob": -1.0}}]'
    return '{"choices": [{"logprobs": {"content": [{"token": "m", "top_logprobs": ' + top + "}]}}]}"


GOOD = json.dumps(with_choice(logprobs={"content": [{"top_logprobs": [{"token": "m", "logprob": -0.5}]}]}))
UTF8 = "application/json; charset="

# What is sent, the reason for which it counts as failed, and what the detail must say of it.
FAILS = {
    "a number beyond every float": (with_logprob("9" * 400), "impossible log-probabilities", "inf"),
    "a number of more digits than Python reads": (with_logprob("9" * 5000), "impossible log-probabilities", "inf"),
    "a float beyond every float": (with_logprob("1e999"), "impossible log-probabilities", "inf"),
    "Infinity": (with_logprob("Infinity"), "impossible log-probabilities", "inf"),
    "NaN": (with_logprob("NaN"), "impossible log-probabilities", "nan"),
    "a list for a number": (with_logprob("[]"), "not a chat completion", "logprob"),
    "nesting": ("[" * 100_000 + "]" * 100_000, "answer is nested too deeply", "[[["),
    "nesting that Python can read": ('{"a": ' * 300 + "1" + "}" * 300, "answer is nested too deeply", '{"a"'),
    "nothing": ("", "answer is not JSON", "line 1"),
    "a page": ("<html>log in</html>", "answer is not JSON", "log in"),
    "bytes of no text": (b'{"choices": "\xff\xfe\x80"}', "answer is not JSON", "codec"),
    "a list": ("[1, 2]", "not a chat completion", "[1, 2]"),
    "a text": ('"m"', "not a chat completion", "m"),
    "no choices": ('{"choices": []}', "not a chat completion", "choices"),
    "choices that are null": ('{"choices": null}', "not a chat completion", "choices"),
    "choices that are an object": ('{"choices": {"a": 1}}', "not a chat completion", "choices"),
    "a choice that is a text": ('{"choices": ["m"]}', "not a chat completion", "choices"),
    "more than can be read": (b" " * (LARGEST_BYTES + 1), "answer is too large", "8 MiB"),
    "a bomb": (bomb("gzip"), "answer is too large", "8 MiB"),
    "a bomb in a bomb": (bomb("gzip, gzip"), "answer cannot be unpacked", "gzip, gzip"),
    "a packing that nobody knows": (send(GOOD, Content_Encoding="zstd"), "answer cannot be unpacked", "zstd"),
    "no packing, but called so": (send(GOOD, Content_Encoding="gzip"), "answer cannot be unpacked", "header"),
    "cut packing": (
        send(gzip.compress(GOOD.encode())[:-12], Content_Encoding="gzip"),
        "answer cannot be unpacked",
        "early",
    ),
    "a chunk of no size": (chunks(b"zz\r\nabc\r\n"), "connection failed", "RemoteProtocolError"),
    "chunks without an end": (chunks(b"3\r\n[1,\r\n"), "connection failed", "RemoteProtocolError"),
    "a redirection": (send("", 302, Location="http://elsewhere/v1"), "HTTP 302", "http://elsewhere/v1"),
    "created": (send(GOOD, 201), "HTTP 201", "choices"),
    "no content": (send("", 204), "HTTP 204", ""),
}
# A number that is no count, in a form of usage that is none: the answer stands, and nothing is counted.
ODD_USAGE = (None, [], [1, 2], "12", 7, True, {}, {"prompt_tokens": -5}, {"prompt_tokens": "7"}, {"prompt_tokens": 1e9})
ODD_USAGE += ({"prompt_tokens": True}, {"prompt_tokens": None}, {"prompt_tokens": [1]})
CHARSETS = (
    "hex",
    "zip",
    "bz2",
    "rot13",
    "idna",
    "punycode",
    "undefined",
    "unicode_escape",
    "utf-7",
    "none",
    "",
)


def reply(content):
    return content if callable(content) else send(content)


@pytest.mark.parametrize("case", FAILS)
def test_a_judge_counts_it_as_a_failure_that_says_why(tmp_path, caplog, case):
    content, reason, said = FAILS[case]
    items = comparisons(2)
    with ChatServer(lambda body, before: reply(content) if "instruction 0" in str(body) else good(body)) as server:
        bad, fine = judge_all(items, server, tmp_path, max_retries=0, concurrency=1)
    assert bad.preference is None and bad.failure.reason == reason and said in bad.failure.detail, bad.failure
    assert len(bad.failure.detail) <= 2200
    assert_right([fine], items[1:])
    assert [line["reason"] for line in lines(tmp_path, FAILURES)] == [reason]
    assert summarise([bad, fine])["n_failed"] == 1


@pytest.mark.parametrize("usage", ODD_USAGE, ids=repr)
def test_a_judge_counts_no_tokens_that_are_no_count(tmp_path, usage):
    with ChatServer(lambda body, before: completion("m", [("m", -0.1)], usage=usage)) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path)
    summary = summarise([judgement])
    assert judgement.preference is not None and (summary["prompt_tokens"], summary["completion_tokens"]) == (0, 0)


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("status", [200, 500])
def test_a_judge_reads_json_whatever_character_set_it_is_said_to_be_in(tmp_path, charset, status):
    answer = send(GOOD if status == 200 else "oops", status, Content_Type=UTF8 + charset)
    with ChatServer(lambda body, before: answer) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path, max_retries=0)
    assert (judgement.preference is None) == (status == 500)
    if status == 500:
        assert judgement.failure.detail == "oops"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip", "identity"])
def test_what_is_packed_without_being_asked_for_is_read(tmp_path, encoding):
    packed = {"deflate": zlib.compress, "identity": bytes}.get(encoding, gzip.compress)(GOOD.encode())
    with ChatServer(lambda body, before: send(packed, Content_Encoding=encoding)) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path)
    assert judgement.preference is not None
    assert server.headers[0]["Accept-Encoding"] == "identity"


def test_a_server_that_asks_to_wait_for_ever_fails_its_request(tmp_path):
    with ChatServer(lambda body, before: send("", 429, Retry_After="1e999")) as server:
        (judgement,) = judge_all(comparisons(1), server, tmp_path)
    assert "wait inf s" in judgement.failure.detail and len(server.bodies) == 1


def test_so_does_one_that_is_asked_for_responses(ask):
    with pytest.raises(GenerationError, match="it asks to wait 86400 s, max_wait_seconds is 120"):
        ask(lambda handler: send("", 429, Retry_After="86400")(handler) or True, max_retries=3)
    assert sum(ask.asked.values()) == 1


# -------------------------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def ask(tokenizer, tmp_path, monkeypatch):
    """What one prompt comes to with a server that replies so; keyword arguments change the server section."""
    prompts = tiny.world_prompts(tokenizer, 1)
    loopback = Loopback(tokenizer)

    def ask(misbehave, key=KEY, **changes):
        monkeypatch.setenv(VARIABLE, key)
        loopback.misbehave = lambda handler, *_: misbehave(handler)
        with serving(loopback) as url:
            names = {"base_url": url, "policy": "tiny", "reference": "other"}
            quick = {"timeout_seconds": 20.0, "max_retries": 0, "backoff_seconds": 0.01, "api_key_env": VARIABLE}
            server = ServerSection(**{**names, **quick, **changes})
            settings = EvaluateSection(engine="server", server=server, temperature=0.0, max_new_tokens=12)
            engine = ServerEngine(server, server.policy, tokenizer, settings, 0, {"model": "served"})
            with kept_responses(tmp_path / "store.jsonl") as kept:
                return respond(prompts, engine, kept, "policy")

    ask.asked = loopback.asked
    return ask


@pytest.mark.parametrize("case", [case for case in FAILS if "log-prob" not in FAILS[case][1] and "number" not in case])
def test_an_engine_counts_it_as_a_failure_that_says_why(ask, case):
    content, reason, said = FAILS[case]

    def misbehave(handler):
        reply(content)(handler)
        return True

    with pytest.raises(GenerationError) as error:
        ask(misbehave)
    expected = "not an answer" if reason == "not a chat completion" else reason
    assert expected in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("usage", ODD_USAGE, ids=repr)
def test_an_engine_takes_no_notice_of_counts_that_are_none(ask, usage):
    answer = {"choices": [{"text": "blue", "finish_reason": "stop"}], "usage": usage}
    (response,) = ask(lambda handler: send_raw(handler, 200, json.dumps(answer).encode()))
    assert response.text == "blue"


# --------------------------------------------------------------------------------------------------------------- keys


def in_lines(text):
    return "\n".join(text[start : start + 7] for start in range(0, len(text), 7))


def quoted(text):
    return urllib.parse.quote(text, safe="")


def in_json(text):
    return json.dumps(text)[1:-1]


def in_base64(text, before=""):
    return base64.b64encode((before + text).encode()).decode()


# How a server may write what it was sent.
WAYS = {
    "plain": str,
    "in JSON": in_json,
    "with every character escaped": lambda text: "".join(f"\\u{ord(character):04X}" for character in text),
    "in Python": lambda text: repr(text.encode())[2:-1],
    "in a URL": quoted,
    "in a URL with small letters": lambda text: quoted(text).lower(),
    "in a page": html.escape,
    "in a page by numbers": lambda text: "".join(f"&#{ord(character)};" for character in text),
    "across lines": in_lines,
    "across lines, escaped": lambda text: in_json(in_lines(text)),
    "across lines of a page": lambda text: in_lines(text).replace("\n", "<br/>\r\n"),
    "in big letters": str.upper,
}
IN_BASE64 = {
    "in base64": in_base64,
    "in base64 behind others": lambda text: in_base64(text + "!", "Bearer "),
    "in base64 for URLs": lambda text: in_base64(text, "u:").replace("+", "-").replace("/", "_"),
    "in base64 across lines": lambda text: in_lines(in_base64(text, "xx")),
}
FORMS = {name: way(KEY) for name, way in (WAYS | IN_BASE64).items()}


def holds_key(text):
    """By another rule than the one that hides it: undo what can be undone, and look for the letters of the key."""
    seen = {text}
    for _ in range(3):
        for one in list(seen):
            seen |= {
                urllib.parse.unquote(one),
                html.unescape(one),
                re.sub(r"\\+u00(..)", lambda c: chr(int(c[1], 16)), one),
            }
            seen.add(re.sub(r"(\\n|<br/>|\s)+", "", one))
            for start in range(4):
                for found in re.findall(r"[A-Za-z0-9+/_-]{16,}", one):
                    padded = found[start:].replace("-", "+").replace("_", "/")
                    padded = padded[: len(padded) // 4 * 4]
                    seen.add(base64.b64decode(padded).decode("latin-1"))
    letters = re.sub(r"[^a-z0-9]", "", KEY.lower())[:-3]
    return any(letters in re.sub(r"[^a-z0-9]", "", one.lower()) for one in seen)


@pytest.mark.parametrize("form", FORMS)
def test_the_key_is_hidden_in_every_form(form):
    said = f"no such key: {FORMS[form]}, said the server"
    hidden = ApiKey(KEY).hide(said)
    assert holds_key(said) and not holds_key(hidden)
    assert hidden.startswith("no such key: ") and hidden.endswith(", said the server") and len(hidden) < 60


@pytest.mark.parametrize("outer", [way for way in WAYS if "lines" not in way])
@pytest.mark.parametrize("inner", FORMS)
def test_the_key_is_hidden_in_one_form_within_another(outer, inner):
    twice = WAYS[outer](FORMS[inner])
    for said in (twice, WAYS["in JSON"](twice), WAYS["in a URL"](twice)):
        hidden = ApiKey(KEY).hide(f"no such key: {said}, said the server")
        assert said not in hidden and "***" in hidden


def test_other_texts_are_left_as_they_are():
    text = 'The model "sk-Proj" answers: a+b=9, [m] 100 % \\n and &lt;b&gt;\n' * 3
    assert ApiKey(KEY).hide(text) == text
    assert ApiKey().hide(text) == text and ApiKey("-").hide("a - b") == "a - b"
    assert KEY not in repr(ApiKey(KEY))


@pytest.fixture
def told(tmp_path, caplog, capfd):
    """Everything that was kept or printed."""
    caplog.set_level(logging.INFO)

    def everything(*more):
        files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
        return "\n".join([*files, caplog.text, *capfd.readouterr(), *map(str, more)])

    return everything


def echoes(form):
    """Answers that hold the key wherever a server could put it."""
    text = FORMS[form]
    top = [("m", -0.5), (text, -1.0)]
    return {
        "as an error": send(text, 500),
        "as an error in JSON": send(json.dumps({"error": {"message": text}}), 400),
        "as the model and as a token": completion("m", top, model=text, system_fingerprint=text),
        "as the answer": completion(text, None),
        "as a name": send(json.dumps({text: [text]})),
        "as where else to ask": send("", 307, Location=urllib.parse.quote(text)),
        "as its packing": send(GOOD, Content_Encoding=urllib.parse.quote(text)),
        "as no JSON": send('{"choices": ' + text),
        "as no HTTP": lambda handler: handler.wfile.write(text.encode() + b"\r\n\r\n"),
        "at the end of what is shown": send("x" * 1990 + text, 500),
        "again and again": send((text + " ") * 2000, 500),
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_judge_neither_keeps_nor_tells_the_key(tmp_path, monkeypatch, told, form):
    monkeypatch.setenv(VARIABLE, KEY)
    answers = list(echoes(form).values())
    items = comparisons(len(answers))

    def choose(body, before):
        return answers[int(re.search(r"instruction (\d+)", str(body["messages"]))[1])]

    with ChatServer(choose) as server:
        judgements = judge_all(items, server, tmp_path, api_key_env=VARIABLE, max_retries=1, concurrency=1)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert [item.failure is None for item in judgements].count(True) == 1
    assert not holds_key(told(judgements, summarise(judgements)))
    assert len(lines(tmp_path, FAILURES)) == len(items) - 1


@pytest.mark.parametrize("form", FORMS)
def test_a_judge_that_gives_up_does_not_tell_the_key(tmp_path, monkeypatch, told, form):
    monkeypatch.setenv(VARIABLE, KEY)
    with ChatServer(lambda body, before: send(FORMS[form], 401)) as server, pytest.raises(JudgeError) as refusal:
        judge_all(comparisons(1), server, tmp_path, api_key_env=VARIABLE)
    assert not holds_key(told(refusal.value, repr(refusal.value)))


@pytest.mark.parametrize("form", ["plain", "in JSON", "in a URL", "in base64 behind others", "across lines"])
def test_an_engine_neither_keeps_nor_tells_the_key(ask, told, form):
    for misbehave in echoes(form).values():

        def once(handler, misbehave=misbehave):
            misbehave(handler)
            return True

        with pytest.raises(GenerationError) as error:
            ask(once)
        assert not holds_key(told(error.value, error.getrepr()))
    text = json.dumps({"choices": [{"text": f"blue {FORMS[form]}", "finish_reason": "stop"}]})
    (response,) = ask(lambda handler: send_raw(handler, 200, text.encode()))
    assert response.text.startswith("blue ") and "***" in response.text and not holds_key(told(response))


BAD_KEYS = {
    "a line break": "sk-first\nsk-second",
    "a carriage return": "sk-first\rsk-second",
    "a control character": "sk-first\x01sk-second",
    "a letter that is not ASCII": "sk-firßt-sk-second",
    "bytes that are no text": "sk-first\udcffsk-second",
    "DEL": "sk-first\x7fsk-second",
}


@pytest.mark.parametrize("what", BAD_KEYS)
def test_a_key_that_cannot_be_sent_is_refused_by_the_name_of_its_variable(tmp_path, ask, monkeypatch, told, what):
    key = BAD_KEYS[what]
    monkeypatch.setenv(VARIABLE, key)
    with (
        ChatServer(good) as server,
        pytest.raises(ConfigError, match=rf"judge\.api_key_env names {VARIABLE}, ") as judge,
    ):
        ChatJudge(settings_for(server, api_key_env=VARIABLE))
    with pytest.raises(ConfigError, match=rf"server\.api_key_env names {VARIABLE}, whose value holds a ") as engine:
        ask(lambda handler: False, key=key)
    monkeypatch.setenv("HF_TOKEN", key)
    hub = None
    if what not in ("a line break", "a carriage return"):  # which the hub's client takes out
        with pytest.raises(ConfigError, match="HF_TOKEN holds a ") as hub:
            commit_of("some/model", None, "model")
    assert not ask.asked and not server.bodies
    said = told(judge.value, engine.value, hub and hub.value)
    assert "sk-first" not in said and "sk-second" not in said and "firßt" not in said


def test_white_space_around_a_key_is_no_part_of_it(ask, monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    assert ApiKey.from_environment(VARIABLE, "there").headers == {"Authorization": f"Bearer {KEY}"}
    monkeypatch.setenv(VARIABLE, f" {KEY}\r\n")
    assert ApiKey.from_environment(VARIABLE, "there").headers == {"Authorization": f"Bearer {KEY}"}


@pytest.mark.parametrize(
    "address", ["http://me:secret@host/v1", "http://host/v1?key=secret", "http://host:99999/v1", "host/v1"]
)
def test_addresses_hold_no_key_and_are_addresses(address):
    with pytest.raises(ValueError, match="base_url: ") as error:
        ServerSection(base_url=address, policy="a", reference="b")
    assert "secret" not in error.value.errors()[0]["msg"]
