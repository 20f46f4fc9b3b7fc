"""Responses are kept as they come: killed and resumed, asked twice, torn, locked, damaged."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import tiny_generation as tiny
from kit.waiting import wait_until

from epsdpo.experiment import EvaluateSection
from epsdpo.models.hub import model_identity
from epsdpo.models.respond import kept_responses, respond, response_key
from epsdpo.models.response import GenerationError, Response
from epsdpo.world.language import build_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


class Counting:
    """An engine that answers with the prompt's own tokens, two at a time, and says what it was asked."""

    def __init__(self, **made_by):
        self.made_by = made_by
        self.asked = []

    def answers(self, prompts, missing):
        wanted = [index for index, is_missing in enumerate(missing) if is_missing]
        for start in range(0, len(wanted), 2):
            self.asked += (members := wanted[start : start + 2])
            yield {index: Response(prompts[index].text, prompts[index].token_ids, True) for index in members}


def lines(path):
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def test_a_killed_run_goes_on_to_the_responses_of_one_that_was_not(tokenizer, tmp_path):
    """SIGKILL in the middle, then a last line torn as a full disk leaves it. Equal to the last bit of the file."""
    count, path = 150, tmp_path / "killed.jsonl"
    command = [sys.executable, tiny.__file__, str(path), str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    wait_until(lambda: lines(path) >= 6 or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 6 <= lines(path) < count
    whole_lines = lines(path) - 1
    path.write_bytes(path.read_bytes()[:-9])

    prompts, engine = tiny.world_prompts(tokenizer, count), tiny.local_engine(tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with kept_responses(path) as kept, kept_responses(tmp_path / "whole.jsonl") as whole:
        assert lines(path) == whole_lines
        resumed = respond(prompts, engine, kept, "tiny")
        assert resumed == respond(prompts, engine, whole, "tiny")
    torch.set_num_threads(threads)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len({response.text for response in resumed}) > 20


def test_what_is_stored_is_not_asked_again(tokenizer, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="epsdpo")
    prompts = tiny.world_prompts(tokenizer, 8)
    with kept_responses(tmp_path / "store.jsonl") as kept:
        respond(prompts[:5], Counting(model="a"), kept, "policy")
    with kept_responses(tmp_path / "store.jsonl") as kept:
        engine = Counting(model="a")
        responses = respond(prompts[::-1], engine, kept, "policy")
        assert engine.asked == [0, 1, 2]  # the last three of the eight, in the order of this call
        assert [response.text for response in responses] == [prompt.text for prompt in prompts[::-1]]
        other = Counting(model="b")
        respond(prompts, other, kept, "reference")
        assert len(other.asked) == 8
    assert "policy: 5 of 8 are answered already" in caplog.text
    assert "policy: asked 3 of 3, about 0 s left" in caplog.text


def test_a_prompt_that_occurs_twice_is_asked_once(tokenizer, tmp_path):
    one, two = tiny.world_prompts(tokenizer, 2)
    with kept_responses(tmp_path / "store.jsonl") as kept:
        engine = Counting()
        responses = respond([one, two, one, one], engine, kept, "policy")
        assert len(engine.asked) == 2 and responses[0] == responses[2] == responses[3] != responses[1]
    assert lines(tmp_path / "store.jsonl") == 2


def test_a_line_says_what_was_asked_of_whom(tokenizer, tmp_path):
    (prompt,) = tiny.world_prompts(tokenizer, 1)
    with kept_responses(tmp_path / "store.jsonl") as kept:
        (response,) = respond([prompt], Counting(model="a", temperature=0.9), kept, "policy")
    record = json.loads((tmp_path / "store.jsonl").read_text(encoding="utf-8"))
    assert record == {
        "key": response_key({"temperature": 0.9, "model": "a"}, prompt.token_ids),
        "made_by": {"model": "a", "temperature": 0.9},
        "prompt": prompt.text,
        "prompt_ids": prompt.token_ids,
        "bos": 1,
        "response": response.text,
        "token_ids": response.token_ids,
        "finished": True,
    }


def test_everything_that_decides_a_response_is_in_its_key():
    key = response_key({"model": "a", "seed": 1}, [1, 2])
    assert key == response_key({"seed": 1, "model": "a"}, [1, 2])
    assert (
        len({key, response_key({"model": "a", "seed": 2}, [1, 2]), response_key({"model": "a", "seed": 1}, [12])}) == 3
    )


def test_an_engine_that_leaves_prompts_out_is_noticed(tokenizer, tmp_path):
    class Forgetful(Counting):
        def answers(self, prompts, missing):
            yield next(super().answers(prompts, missing))

    with (
        kept_responses(tmp_path / "store.jsonl") as kept,
        pytest.raises(GenerationError, match="3 of 5 prompts have no"),
    ):
        respond(tiny.world_prompts(tokenizer, 5), Forgetful(), kept, "policy")
    assert lines(tmp_path / "store.jsonl") == 2


def test_two_writers_at_once_are_refused(tmp_path):
    with (
        kept_responses(tmp_path / "store.jsonl"),
        pytest.raises(ValueError, match="another process writes to it"),
        kept_responses(tmp_path / "store.jsonl"),
    ):
        pass


def test_a_line_that_was_changed_is_refused_with_its_number(tokenizer, tmp_path):
    path = tmp_path / "store.jsonl"
    with kept_responses(path) as kept:
        respond(tiny.world_prompts(tokenizer, 3), Counting(model="a"), kept, "policy")
    whole = path.read_text(encoding="utf-8")
    for old, new, line in (('"model": "a"', '"model": "b"', 1), ('"key"', "key", 1), ('"finished": true}\n{', "{", 1)):
        path.write_text(whole.replace(old, new, 1), encoding="utf-8")
        with (
            pytest.raises(ValueError, match=rf"store.jsonl, line {line}: not an answer .* Remove the line"),
            kept_responses(path),
        ):
            pass


def test_stop_tokens_of_the_settings_end_a_response(tokenizer, tmp_path):
    prompts = tiny.world_prompts(tokenizer, 6)
    greedy = EvaluateSection(temperature=0.0, max_new_tokens=12, batch_size=3)
    with kept_responses(tmp_path / "a.jsonl") as kept:
        first = respond(prompts, tiny.local_engine(tokenizer, greedy), kept, "tiny")
    stop = first[0].token_ids[4]
    stopping = greedy.model_copy(update={"stop_token_ids": [stop]})
    with kept_responses(tmp_path / "b.jsonl") as kept:
        second = respond(prompts, tiny.local_engine(tokenizer, stopping), kept, "tiny")
    for before, after in zip(first, second, strict=True):
        end = before.token_ids.index(stop) + 1 if stop in before.token_ids else len(before.token_ids)
        assert after.token_ids == before.token_ids[:end]
    assert len(second[0].token_ids) <= 5 and second[0].finished


def test_a_model_is_told_by_its_files_wherever_they_lie(tokenizer, tmp_path):
    for name in "abc":
        tiny.tiny_model(tokenizer).save_pretrained(tmp_path / name)
    (tmp_path / "b" / "training_args.bin").write_bytes(b"when and where it was trained")
    same, other = (model_identity(str(tmp_path / name), None) for name in "ab")
    assert same == other
    weights = tmp_path / "c" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(str(tmp_path / "c"), None) != same
