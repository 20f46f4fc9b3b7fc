"""Pairs of a model's own responses: what is asked, how it is scored, which two make a pair, runs that were killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from kit import tiny_stages
from kit.chat_server import ChatServer, send
from kit.waiting import wait_until
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from epsdpo.data.on_policy.pairs import best_and_worst, make_pairs
from epsdpo.data.on_policy.sample import GENERATED, SCORES, sample_pairs
from epsdpo.data.prepared import DataError, prepare, with_sampled_pairs
from epsdpo.experiment import ConfigError, check_experiment
from epsdpo.models.start import load_tokenizer
from epsdpo.world.language import gold_score


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return tiny_stages.settings(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def sampled(values, tmp_path_factory):
    """A whole run, and its folder."""
    folder = tmp_path_factory.mktemp("pairs")
    return sample_pairs(tiny_stages.experiment_of(values), folder), folder


@pytest.mark.parametrize(
    ("texts", "scores", "chosen"),
    [
        (["a", "b", "c"], [0.1, 0.9, 0.5], (1, 0)),
        (["a", "b", "c"], [0.9, 0.1, 0.1], (0, 1)),  # the first of equals
        (["a", "b", "b"], [0.9, 0.9, 0.1], (0, 2)),
        (["a", " ", "c"], [0.5, 0.9, 0.1], (0, 2)),  # blank text is no response
        (["a", "b", "c"], [0.5, None, 0.1], (0, 2)),  # nor is one that could not be scored
        (["a", "a", "a"], [0.5, 0.5, 0.5], "no_two_texts"),
        (["a", " ", "c"], [0.5, 0.9, None], "no_two_texts"),
        (["a", "b", "c"], [0.5, 0.5, 0.5], "tied"),
    ],
)
def test_best_and_worst_by_hand(texts, scores, chosen):
    assert best_and_worst(texts, scores) == chosen


def test_prompts_without_a_pair_are_named_by_reason():
    prompts = pd.DataFrame({"prompt_id": ["x", "y", "z"], "messages": [[{"role": "user", "content": "?"}]] * 3})
    responses = pd.DataFrame(
        [("x", "a", 1.0), ("x", "b", 2.0), ("y", "a", 1.0), ("y", "b", 1.0), ("z", "a", 1.0), ("z", "b", None)],
        columns=["prompt_id", "response", "score"],
    )
    pairs, refused = make_pairs(prompts, responses)
    assert refused == {"tied": ["y"], "no_two_texts": ["z"]}
    assert pairs.to_dict("records") == [
        {
            "pair_id": "x",
            "prompt": [{"role": "user", "content": "?"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "a"}],
            "chosen_score": 2.0,
            "rejected_score": 1.0,
        }
    ]


def test_each_prompt_is_asked_once_and_answered_several_times(sampled):
    result, _ = sampled
    report = result.report
    assert (report["prompts"]["rows_read"], report["prompts"]["asked"]) == (7, 6)  # one occurs twice
    assert len(result.responses) == report["responses"] == 6 * 3
    assert result.responses["number"].tolist() == [0, 1, 2] * 6
    assert result.responses.groupby("prompt_id")["response"].nunique().max() == 3  # rounds differ in their seed
    prompts = {turns[-1]["content"] for turns in result.pairs["prompt"]}
    assert "another question" not in prompts  # of the column that was not asked for


def test_pairs_are_best_and_worst_by_the_reward_models_own_logits(sampled, values):
    result, folder = sampled
    place = values["data"]["on_policy"]["ranker"]["model"]
    model = AutoModelForSequenceClassification.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    prompts = dict(zip(result.pairs["pair_id"], result.pairs["prompt"], strict=True))
    for prompt_id, own in result.responses[result.responses["prompt_id"].isin(list(prompts))].groupby("prompt_id"):
        question = prompts[prompt_id][-1]["content"]
        with torch.no_grad():
            rewards = [
                model(**tokenizer(question, text, return_tensors="pt", return_token_type_ids=False)).logits.item()
                for text in own["response"]
            ]
        assert own["score"].tolist() == pytest.approx(rewards, abs=1e-4)
        pair = result.pairs.set_index("pair_id").loc[prompt_id]
        texts = own["response"].tolist()
        assert pair["chosen"][0]["content"] == texts[rewards.index(max(rewards))]
        assert pair["rejected"][0]["content"] == texts[rewards.index(min(rewards))]
    assert len(result.pairs) + sum(entry["prompts"] for entry in result.report["refused"].values()) == 6
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "responses.parquet"), result.responses)


def test_a_killed_run_goes_on_and_comes_to_the_same_pairs(values, tmp_path):
    slow = tiny_stages.settings(tmp_path / "models", batch_size=1, max_new_tokens=32)
    config = tiny_stages.write_config(slow, tmp_path / "config.yaml")
    undisturbed = sample_pairs(tiny_stages.experiment_of(slow), tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, tiny_stages.__file__, str(config), str(killed)])
    answers = killed / GENERATED
    try:
        wait_until(lambda: answers.exists() and answers.read_bytes().count(b"\n") >= 3, seconds=120)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    before = answers.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert 3 <= before.count(b"\n") < 18 and not (killed / "report.json").exists()
    result = sample_pairs(tiny_stages.experiment_of(slow), killed)
    pd.testing.assert_frame_equal(result.responses, undisturbed.responses)
    pd.testing.assert_frame_equal(result.pairs, undisturbed.pairs)
    after = answers.read_bytes()
    assert after.startswith(before) and after == (tmp_path / "undisturbed" / GENERATED).read_bytes()


def test_a_server_answers_for_the_model(values, tmp_path):
    """It says a word for each seed; the token ids are the tokenizer's, and each is ended by EOS."""
    words = ["one", "two", "three", "four", "five"]

    def choose(body, before):
        choice = {"text": words[body["seed"] % len(words)], "finish_reason": "stop"}
        return send(json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"])}}))

    with ChatServer(choose) as server:
        address = {"base_url": server.url, "model": "base"}
        on_policy = {**values["data"]["on_policy"], "engine": "server", "server": address}
        result = sample_pairs(
            tiny_stages.experiment_of({**values, "data": {**values["data"], "on_policy": on_policy}}), tmp_path
        )
    assert len(server.bodies) == 6 * 3 and len({tuple(body["prompt"]) for body in server.bodies}) == 6
    assert {body["model"] for body in server.bodies} == {"base"}
    assert len({body["seed"] for body in server.bodies}) == 6 * 3
    assert set(result.responses["response"]) <= set(words) and result.responses["finished"].all()
    made_by = json.loads((tmp_path / GENERATED).read_text(encoding="utf-8").splitlines()[0])["made_by"]
    assert (made_by["server"], made_by["name"], made_by["engine"]) == (server.url, "base", "server")


def test_scores_that_are_there_are_not_asked_for_again(sampled, values, tmp_path):
    result, folder = sampled
    again = tiny_stages.copy_without(folder, tmp_path / "again", "report.json", "*.parquet")
    lines = (again / SCORES).read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0])
    kept = {**first, "score": 1000.0}  # recognisable, and the best of its prompt
    (again / SCORES).write_bytes(json.dumps(kept).encode() + b"\n" + lines[1] + lines[2][:20])
    repeated = sample_pairs(tiny_stages.experiment_of(values), again)
    changed = repeated.responses["score"] == 1000.0
    assert changed.any() and not changed.all()
    pd.testing.assert_frame_equal(repeated.responses[~changed], result.responses[~changed])


def test_prepare_reads_the_pairs_of_a_finished_folder_only(sampled, values, tmp_path):
    result, folder = sampled
    experiment = tiny_stages.experiment_of(values)
    tokenizer = load_tokenizer(experiment)
    with pytest.raises(DataError, match="Run the stage `sample` first"):
        prepare(experiment.data, tokenizer, tmp_path / "data", max_length=64)
    unfinished = tiny_stages.copy_without(folder, tmp_path / "unfinished", "report.json")
    with pytest.raises(ConfigError, match=r"holds no report\.json: sampling has not ended"):
        with_sampled_pairs(experiment.data, unfinished)
    prepared = prepare(with_sampled_pairs(experiment.data, folder), tokenizer, tmp_path / "data", max_length=64)
    assert prepared.train["pair_id"][:] == result.pairs["pair_id"].tolist()
    assert prepared.train["chosen"][0].startswith(result.pairs["chosen"][0][0]["content"])
    turn = tokenizer.convert_tokens_to_ids(tiny_stages.TURN)
    assert all(ids[-1] == turn for ids in prepared.train["chosen_ids"])  # the template that the config gives it


def test_a_prompt_longer_than_the_limit_is_not_asked(values, tmp_path):
    experiment = tiny_stages.experiment_of(values)
    tokenizer = load_tokenizer(experiment)
    prompts = Path(values["data"]["on_policy"]["prompts"]["source"]).read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["prompt"] for line in prompts}
    lengths = sorted(
        len(tokenizer(f"<bos>{text}{tiny_stages.TURN} so", add_special_tokens=False).input_ids) for text in texts
    )
    limit = lengths[2]
    data = {**values["data"], "max_prompt_length": limit}
    result = sample_pairs(tiny_stages.experiment_of({**values, "data": data}), tmp_path)
    assert result.report["prompts"]["asked"] == sum(length <= limit for length in lengths) < 6


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"source": "pairs.jsonl"}, "needs an `on_policy` section"),
        ({"eval_split": "test"}, "sampled have one split only"),
        ({"on_policy": None}, "`on_policy` is missing"),
        ({"on_policy": {"ranker": {"model": "world"}, "prompts": {"source": "p.jsonl"}}}, "Name a reward model"),
        ({"on_policy": {"prompts": {"source": "p.jsonl"}}}, r"data.on_policy.ranker is missing"),
        ({"on_policy": {"ranker": {"model": "world"}, "engine": "vllm"}}, "start `vllm serve MODEL` and use engine: s"),
        ({"on_policy": {"ranker": {"model": "world"}, "engine": "server"}}, "`server` is missing.* base_url and model"),
    ],
)
def test_sections_that_make_no_sense_are_refused(values, change, problem):
    with pytest.raises(ConfigError, match=problem):
        check_experiment({**values, "data": {**values["data"], **change}}, where="test")


def test_a_classifier_of_several_labels_is_no_ranker(values, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(values["data"]["on_policy"]["ranker"]["model"])
    torch.manual_seed(0)
    several = type(model)(type(model.config)(**{**model.config.to_dict(), "num_labels": 3, "id2label": None}))
    several.save_pretrained(tmp_path / "labels")
    AutoTokenizer.from_pretrained(values["data"]["on_policy"]["ranker"]["model"]).save_pretrained(tmp_path / "labels")
    on_policy = {**values["data"]["on_policy"], "ranker": {"model": str(tmp_path / "labels"), "dtype": "float32"}}
    wrong = tiny_stages.experiment_of({**values, "data": {**values["data"], "on_policy": on_policy}})
    with pytest.raises(ConfigError, match=r"data\.on_policy\.ranker\.model.*has 3 labels"):
        sample_pairs(wrong, tmp_path / "out")


def test_the_worlds_instructions_are_scored_by_their_own_rules(values, tmp_path):
    """The base model babbles; what counts is which instructions are asked, and that the score is their gold reward."""
    on_policy = {"ranker": {"model": "world"}, "prompts": {"max_prompts": 3}, "max_new_tokens": 8}
    world = {"source": "on_policy", "on_policy": {**on_policy, "responses_per_prompt": 2}}
    experiment = tiny_stages.experiment_of({**values, "data": world})
    try:
        sample_pairs(experiment, tmp_path)
    except DataError as error:  # babble may be all of one worth
        assert "none of 3 prompts comes to a pair" in str(error)
    from epsdpo.world.build import render, sample_instructions

    instructions = [render(item) for item in sample_instructions(3, experiment.data.world.seed, "train")]
    answers = [json.loads(line) for line in (tmp_path / GENERATED).read_text(encoding="utf-8").splitlines()]
    assert {answer["prompt"] for answer in answers} == {f"<bos>{text}{tiny_stages.TURN} so" for text in instructions}
    scores = [json.loads(line)["score"] for line in (tmp_path / SCORES).read_text(encoding="utf-8").splitlines()]
    asked = {text: f"<bos>{text}{tiny_stages.TURN} so" for text in instructions}
    expected = {
        gold_score(text, answer["response"]) for text in asked for answer in answers if answer["prompt"] == asked[text]
    }
    assert set(scores) == expected
