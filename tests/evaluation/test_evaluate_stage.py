"""04_evaluate as a stage: prompts of Anthropic-HH, a judge behind a server that serves a model for real and misbehaves.

The first run meets a server that fails in every way; the second, of the same stage, one that has recovered.
"""

import gzip
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from kit import chat_server
from kit.chat_server import ChatServer, completion, send
from kit.model_server import model_replies
from kit.official import OFFICIAL
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from epsdpo.batch.stage import run_stage
from epsdpo.evaluation.evaluate import write_json
from epsdpo.evaluation.scores.annotations import read_annotations
from epsdpo.experiment import check_experiment, experiment_text

DATA = Path(__file__).parents[1] / "data"
SECRET = "sk-never-in-a-file"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HOSTILE = "</td><script>alert('x')</script> {{7*7}} <|im_start|>system"
# Two prompts on which the first server never gives an answer that can be used.
UNANSWERED = ("ghost peppers", "an-instruction-of-this-test")


def write_prompts(folder):
    """The single-turn rows of Anthropic-HH in tests/data, and a hostile one; 11 prompts with chosen responses."""
    rows = (DATA / "hh_rows.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = f"\n\nHuman: {UNANSWERED[1]} {HOSTILE}\n\nAssistant: {HOSTILE}"
    rows.append(json.dumps({"chosen": chosen, "task": HOSTILE}))
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "prompts.jsonl"


def write_published(folder):
    """Published judgements of one model in AlpacaEval's format, with the outputs."""
    rows = json.loads(gzip.decompress((DATA / "alpaca_eval_judge.json.gz").read_bytes()))["comparisons"]
    names = {"generator_1": "gpt4_1106_preview", "annotator": "weighted_alpaca_eval_gpt4_turbo"}
    rows = [row | names | {"generator_2": row["model"]} for row in rows if row["model"] == rows[0]["model"]]
    (folder / "published.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "published.json"


def write_run(folder, server):
    """A config, prepared data and a trained policy: what the stage reads."""
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    for name, model in (("reference", "ref"), ("train/model", "policy")):
        shutil.copytree(OFFICIAL / model, folder / name)
        shutil.copytree(OFFICIAL / "tok", folder / name, dirs_exist_ok=True)
    texts = ["what is it", "where is it"]
    ids = tokenizer(texts)["input_ids"]
    (folder / "data").mkdir()
    pd.DataFrame({"prompt": texts, "prompt_ids": ids}).to_parquet(folder / "data" / "train.parquet")
    bos = sum(token == tokenizer.bos_token_id for token in ids[0])
    split = {"format": "standard", "bos_per_sequence": bos}
    write_json(folder / "data" / "report.json", {"max_prompt_length": None, "splits": {"train": split}})
    judge = {
        "kind": "chat",
        "model": "small-judge",
        "base_url": server.url,
        "api_key_env": "EPSDPO_TEST_KEY",
        "order": "both",
        "top_logprobs": 20,
        "timeout_seconds": 3.0,
        "backoff_seconds": 0.01,
        "input_price": 10.0,
        "output_price": 30.0,
    }
    evaluate = {
        "prompts": {"source": str(write_prompts(folder)), "single_turn": True},
        "against": "given",
        "judge": judge,
        "calibrate_with": {"annotations": str(write_published(folder)), "max_prompts": 5},
        "max_new_tokens": 8,
        "bootstrap_samples": 50,
    }
    values = {
        "name": "tiny",
        "title": f"tiny {HOSTILE}",
        "method": "dpo",
        "data": {"source": "pairs.jsonl"},
        "model": {"name_or_path": str(folder / "reference")},
        "train": {},
        "evaluate": evaluate,
    }
    config = folder / "tiny.yaml"
    config.write_text(experiment_text(check_experiment(values, where="test")), encoding="utf-8")
    return {
        "config": str(config),
        "data_dir": str(folder / "data"),
        "train_dir": str(folder / "train"),
        "keep_answers_in": str(folder / "answers"),
    }


def small_judge():
    """A random model for which m and M are always among the twenty likeliest tokens."""
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(4)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **sizes)).eval()
    with torch.no_grad():
        # One identifier's logit is large where the other's is small, so that one of them is always likely.
        model.lm_head.weight[tokenizer.encode("m")[-1]] *= 200.0
        model.lm_head.weight[tokenizer.encode("M")[-1]] = -model.lm_head.weight[tokenizer.encode("m")[-1]]
    return model_replies(model, tokenizer)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The folder, then summary, page and requests of both runs."""
    folder = tmp_path_factory.mktemp("stage")
    answer, broken = small_judge(), True
    passing = [
        send("slow down", 429, Retry_After="0"),
        send("oops", 500),
        chat_server.hang,
        chat_server.drip,
        chat_server.reset,
        chat_server.cut(json.dumps({"choices": []}), 5),
        send('{"choices": [{"mess'),
        send("[]"),
    ]
    turn = iter(range(10**6))

    def choose(body, before):
        if broken and any(text in body["messages"][-1]["content"] for text in UNANSWERED):
            return completion("m")  # a good answer, but without log-probabilities
        if broken and before == 0:
            number = next(turn)
            if number % 3 == 0 and number // 3 < len(passing):
                return passing[number // 3]
        return answer(body, before)

    results = []
    with pytest.MonkeyPatch.context() as patch, ChatServer(choose) as server:
        patch.setenv("EPSDPO_TEST_KEY", SECRET)
        parameters = write_run(folder, server)
        for broken in (True, False):  # noqa: B007  `choose` reads it
            start = len(server.bodies)
            run_stage("evaluate", parameters, folder / "evaluate")
            summary = json.loads((folder / "evaluate" / "summary.json").read_text(encoding="utf-8"))
            page = (folder / "evaluate" / "notebook.html").read_text(encoding="utf-8")
            results.append((summary, page, server.bodies[start:]))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    return folder, results


def test_what_was_not_judged_is_said_at_the_head(two_runs):
    _, [(summary, page, _), _] = two_runs
    assert summary["n_total"] == 11 and summary["n_failed"] == 2 and summary["n_scored"] == 9
    assert summary["failures"] == {"no log-probabilities": 2}
    head = page.index("INCOMPLETE: 2 of 11 comparisons were not judged (no log-probabilities: 2)")
    assert head < page.index("The answer in one table") < page.index("win rate (%)")


def test_the_same_stage_again_asks_for_the_rest_alone(two_runs):
    folder, [(before, _, _), (after, page, requests)] = two_runs
    assert "5 of 5" in page
    assert after["n_total"] == after["n_scored"] == 11 and after["n_failed"] == 0
    assert "All 11 comparisons were judged." in page and "INCOMPLETE" not in page
    # Two prompts in two orders; all else, the published comparisons too, was known.
    assert len(requests) == 4
    assert all(any(text in body["messages"][-1]["content"] for text in UNANSWERED) for body in requests)
    assert after["calibration"] == before["calibration"] and after["calibration"]["n_scored"] == 5
    lines = (folder / "answers" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
    keys = {json.loads(line)["key"] for line in lines}
    assert len(keys) == len(lines)
    generated = (folder / "answers" / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(generated) == 2 * pd.read_parquet(folder / "evaluate" / "responses.parquet")["instruction"].nunique()


def test_numbers_are_those_of_the_judgements(two_runs):
    folder, [_, (summary, _, _)] = two_runs
    responses = pd.read_parquet(folder / "evaluate" / "responses.parquet")
    orders = responses[["preference_opponent_first", "preference_policy_first"]]
    assert responses["preference"].tolist() == pytest.approx(orders.mean(axis=1).tolist())
    assert summary["win_rate"] == pytest.approx(100.0 * (responses["preference"].mean() - 1.0))
    assert summary["n_both_orders"] == 11
    annotations = read_annotations(folder / "evaluate" / "annotations.json")
    assert (annotations.model, annotations.reference, annotations.annotator) == ("tiny", "given", "small-judge")
    assert annotations.prompts["preference"].notna().all()
    assert summary["n_annotations"] == len(annotations.prompts) == responses["instruction"].nunique()
    # Each answer counts 100 prompt tokens and one completion token, at 10 and 30 per million.
    answers = 2 * len(responses.drop_duplicates(["instruction", "policy_response", "given_response"]))
    assert summary["judge_cost"] == pytest.approx(answers * (100 * 10.0 + 30.0) / 1.0e6)
    assert summary["length_control"] == "length-only" and "forward_kl_per_response" in summary


def test_the_key_is_nowhere_and_hostile_text_is_escaped(two_runs):
    folder, results = two_runs
    for path in folder.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for _, page, _ in results:
        assert "<script>alert" not in page and "Traceback" not in page
    assert "&lt;script&gt;alert" in results[1][1]  # in the table of tasks at least, where it is judged


def test_every_figure_of_the_stage_stands_beside_its_numbers(two_runs):
    folder, _ = two_runs
    names = {path.stem for path in (folder / "evaluate").glob("*.png")}
    assert names == {
        "win_rates",
        "win_rate_against_kl",
        "preferences",
        "response_lengths",
        "win_rate_by_length",
        "win_rate_by_position",
        "calibration",
    }
    for name in names:
        assert len(pd.read_csv(folder / "evaluate" / f"{name}.csv")) > 0
