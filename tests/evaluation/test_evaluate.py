"""KL against full logits, the annotations format, the tables, and one whole evaluation of a tiny model."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from epsdpo.evaluation.evaluate import evaluate, write_json
from epsdpo.evaluation.examples import examples, side_by_side
from epsdpo.evaluation.judges.answers import second_wins_by_rewards
from epsdpo.evaluation.kl import sequence_kl
from epsdpo.evaluation.tables import by_task, headline
from epsdpo.experiment import PromptsSection, WorldSection, check_experiment
from epsdpo.methods import kernels
from epsdpo.plots import evaluation as evaluation_figures
from epsdpo.world.language import TASKS, build_tokenizer, follows_every_rule, gold_score, render, sample_instructions

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}
VOCABULARY = 101

# Each family turns head outputs into logits in its own way.
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5}),
}


def tiny_model(family="llama", seed=0, vocabulary=VOCABULARY, **settings):
    model_class, config_class, extra = FAMILIES[family]
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return model_class(config_class(vocab_size=vocabulary, **tokens, **TINY, **extra, **settings)).eval()


def random_sequences(count=7):
    generator = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [(ids(1, 12), ids(1, 20)) for _ in range(count)]


@torch.no_grad()
def kl_from_full_logits(policy, reference, prompt, response):
    """One sequence at a time, no padding, float64 softmax over the model's own logits."""
    ids = torch.tensor([prompt + response])
    where = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    log_p = policy(ids).logits[0, where].double().log_softmax(-1)
    log_q = reference(ids).logits[0, where].double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_equals_the_full_logits_formula(family):
    policy, reference = tiny_model(family, seed=0), tiny_model(family, seed=1)
    sequences = random_sequences()
    expected = [kl_from_full_logits(policy, reference, *sequence) for sequence in sequences]
    result = sequence_kl(policy, reference, sequences, batch_size=3)
    assert min(expected) > 0.05
    assert result.nats == pytest.approx(expected, rel=1e-4)
    assert result.tokens.tolist() == [len(response) for _, response in sequences]


def test_kl_of_a_model_with_itself_is_zero():
    model = tiny_model()
    assert (sequence_kl(model, model, random_sequences(), batch_size=4).nats == 0.0).all()


def test_kl_does_not_depend_on_batches():
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    one, all_at_once = (sequence_kl(policy, reference, random_sequences(), size).nats for size in (1, 7))
    assert one == pytest.approx(all_at_once, rel=1e-5)


def test_kl_estimates_the_log_ratio_of_samples():
    """The summed divergence and the log-ratio log π(y)/π_ref(y) of y ~ π have the same expectation."""
    policy, reference = tiny_model(seed=0), tiny_model(seed=1)
    prompt, length, count = [1, 5, 9], 3, 4000
    torch.manual_seed(0)
    with torch.no_grad():
        ids = torch.tensor([prompt] * count)
        for _ in range(length):
            drawn = torch.multinomial(policy(ids).logits[:, -1].softmax(-1), 1)
            ids = torch.cat([ids, drawn], dim=1)
        where, labels = slice(len(prompt) - 1, -1), ids[:, len(prompt) :, None]
        log_p, log_q = (model(ids).logits[:, where].log_softmax(-1).gather(2, labels) for model in (policy, reference))
    log_ratios = (log_p - log_q).sum(dim=(1, 2))
    nats = sequence_kl(policy, reference, [(prompt, row[len(prompt) :].tolist()) for row in ids], 500).nats
    assert nats.std() < 0.5 * log_ratios.std().item()  # what Rao-Blackwell buys
    standard_error = log_ratios.std().item() / math.sqrt(count)
    assert nats.mean() == pytest.approx(log_ratios.mean().item(), abs=4.0 * standard_error)


def every_response(end, vocabulary, longest, begun=()):
    """All responses of a model that stops at `end` or after `longest` tokens."""
    for token in range(vocabulary):
        response = [*begun, token]
        if token == end or len(response) == longest:
            yield response
        else:
            yield from every_response(end, vocabulary, longest, response)


@torch.no_grad()
def log_probability(model, prompt, response):
    where = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    log_p = model(torch.tensor([prompt + response])).logits[0, where].log_softmax(-1)
    return float(log_p.gather(1, torch.tensor(response)[:, None]).sum())


@pytest.mark.parametrize("tile", [2, 2048])
def test_both_kls_are_those_of_the_distributions_over_responses(tile, monkeypatch):
    """Σ_y p(y) log p(y)/q(y) over all 341 possible responses is what the sums of token divergences average to."""
    monkeypatch.setattr(kernels, "VOCABULARY_PER_TILE_ON_CPU", tile)
    monkeypatch.setattr(kernels, "TOKENS_PER_TILE_ON_CPU", 7 * tile)
    policy, reference = (tiny_model(seed=seed, vocabulary=5).double() for seed in (0, 1))
    prompt = [1, 4, 3]
    responses = list(every_response(end=2, vocabulary=5, longest=4))
    assert len(responses) == 341
    log_policy, log_reference = (
        np.array([log_probability(model, prompt, response) for response in responses]) for model in (policy, reference)
    )
    exact = {}
    for name, model, other, log_p, log_q in (
        ("reverse", policy, reference, log_policy, log_reference),
        ("forward", reference, policy, log_reference, log_policy),
    ):
        assert np.exp(log_p).sum() == pytest.approx(1.0, abs=1e-12)
        exact[name] = float((np.exp(log_p) * (log_p - log_q)).sum())
        result = sequence_kl(model, other, [(prompt, response) for response in responses], batch_size=50)
        assert float((np.exp(log_p) * result.nats).sum()) == pytest.approx(exact[name], abs=1e-10)
    assert abs(exact["reverse"] - exact["forward"]) > 0.01  # otherwise the direction would not be seen


def test_kl_refuses_different_vocabularies_and_empty_sequences():
    with pytest.raises(ValueError, match="vocabularies of 101 and 50"):
        sequence_kl(tiny_model(), tiny_model(vocabulary=50), [([1], [2])], 1)
    with pytest.raises(ValueError, match="sequence 1 has 1 prompt and 0 response tokens"):
        sequence_kl(tiny_model(), tiny_model(), [([1], [2]), ([1], [])], 1)


# ----------------------------------------------------------------------------------------------------------- the judge


def test_rewards_become_chances_by_hand():
    assert second_wins_by_rewards(0.0, 0.0, 0.25) == 0.5
    assert second_wins_by_rewards(0.0, 0.25 * math.log(3.0), 0.25) == pytest.approx(0.75)
    assert second_wins_by_rewards(0.25 * math.log(3.0), 0.0, 0.25) == pytest.approx(0.25)
    assert second_wins_by_rewards(-1e6, 1e6, 0.25) == 1.0


def test_gold_judge_scores_texts():
    assert gold_score("repeat the word blue 3 times", "blue blue blue") == 1.0
    assert gold_score("repeat the word blue 3 times", "blue blue") < 1.0
    assert follows_every_rule("repeat the word blue 3 times", "blue blue blue")
    assert not follows_every_rule("repeat the word blue 3 times", "blue red blue")
    with pytest.raises(ValueError, match="not an instruction of the embedded world"):
        gold_score("ignore the judge", "blue")


HOSTILE = "</td><script>alert('x')</script> \"quoted\"\n\u2028 {{7*7}} \\ \x00 ＊ 🙂"


@pytest.fixture
def judged():
    """Four prompts: a win, a loss, identical answers, and a win in hostile text."""
    table = pd.DataFrame(
        {
            "prompt_id": ["a", "b", "c", "d"],
            "instruction": ["count up from 1 to 3", "repeat the word fig 2 times", "count up from 2 to 4", HOSTILE],
            "task": ["count_up", "repeat", "count_up", "repeat"],
            "policy_response": ["1 2 3", "fig", "2 3 4", HOSTILE],
            "reference_response": ["1 2", "fig fig", "2 3 4", ""],
            "policy_gold": [1.0, 0.5, 1.0, 0.2],
            "reference_gold": [0.5, 1.0, 1.0, 0.0],
            "policy_tokens": [4, 2, 4, 9],
            "reference_tokens": [3, 3, 4, 1],
            "policy_finished": [True, True, True, False],
            "reference_finished": [True, True, True, True],
        }
    )
    rewards = zip(table["reference_gold"], table["policy_gold"], strict=True)
    preference = [1.0 + second_wins_by_rewards(*pair, 0.25) for pair in rewards]
    return table.assign(preference=preference, preference_opponent_first=preference, preference_policy_first=np.nan)


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": float("nan")}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


# ---------------------------------------------------------------------------------------------------------- the tables


def test_examples_are_the_biggest_wins_and_losses_and_others(judged):
    rows = examples(judged, count=1, seed=0)
    assert rows["chosen_as"].tolist() == ["biggest win", "biggest loss", "random"]
    assert rows["prompt_id"].tolist()[:2] == ["a", "b"]
    assert rows["prompt_id"][2] in {"c", "d"}
    everything = examples(judged, count=10, seed=0)
    assert sorted(everything["prompt_id"]) == ["a", "b", "c", "d"]
    assert (everything.set_index("prompt_id")["chosen_as"]["c"]) == "random"


def test_side_by_side_escapes_what_models_wrote(judged):
    page = side_by_side(examples(judged, count=10, seed=0))
    assert "<script>" not in page and page.count("&lt;script&gt;") == 2
    assert page.count("cut at max_new_tokens") == 1
    assert page.count("(empty)") == 1


def test_table_by_task(judged):
    table = by_task(judged, samples=100, seed=0)
    assert table["prompts"].to_dict() == {"count_up": 2, "repeat": 2}
    expected = 100.0 * (judged["preference"][[0, 2]].mean() - 1.0)
    assert table.loc["count_up", "win rate (%)"] == pytest.approx(expected)
    assert (table["low"] <= table["win rate (%)"]).all() and (table["win rate (%)"] <= table["high"]).all()


@pytest.mark.parametrize(
    ("rate", "low", "high"), [(63.0, 58.0, 68.0), (100.0, 100.0, 100.0), (2.0, 0.0, 4.0), (50.0, 49.9, 50.1)]
)
def test_win_rate_figure_shows_interval_and_the_even_line(rate, low, high):
    table = pd.DataFrame({"label": ["raw"], "win_rate": [rate], "low": [low], "high": [high]})
    figure = evaluation_figures.win_rates(table, "title")
    left, right = figure.axes[0].get_xlim()
    assert left < min(low, 50.0) and max(high, 50.0) < right
    assert [text.get_text() for text in figure.axes[0].texts] == [f"{rate:.1f}"]


def test_figures_count_every_prompt(judged):
    differences = evaluation_figures.gold_differences(judged)
    legend = [text.get_text() for text in differences.axes[0].get_legend().get_texts()]
    assert legend == ["better: 2 of 4", "equal: 1 of 4", "worse: 1 of 4"]
    assert sum(bar.get_height() for bars in differences.axes[0].containers for bar in bars) == pytest.approx(4.0)
    lengths = evaluation_figures.response_lengths(judged)
    assert sum(bar.get_height() for bar in lengths.axes[0].containers[0]) == pytest.approx(1.0)
    assert "policy, mean 4.8" in [text.get_text() for text in lengths.axes[0].get_legend().get_texts()]


def test_figures_of_level_runs_can_be_drawn(judged):
    level = judged.assign(policy_gold=judged["reference_gold"], policy_tokens=judged["reference_tokens"])
    evaluation_figures.gold_differences(level).canvas.draw()
    evaluation_figures.response_lengths(level).canvas.draw()


# -------------------------------------------------------------------------------------------------- a whole evaluation


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment on a random model that speaks the world's words, with prompts, policy and reference on disk."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = build_tokenizer()
    for name, seed in (("reference", 0), ("train/model", 1)):
        model = tiny_model(seed=seed, vocabulary=len(tokenizer))
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    texts = [render(instruction) for instruction in sample_instructions(20, 0, "prompts")]
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in texts
    ]
    rendered = [f"<bos><user> {text} <assistant>" for text in texts]
    prompts = {"prompt_id": [f"p{row}" for row in range(20)], "instruction": texts, "prompt_ids": ids, "task": TASKS[0]}
    pd.DataFrame(prompts).to_parquet(folder / "data" / "prompts.parquet")
    trained = pd.DataFrame({"prompt": rendered, "prompt_ids": ids})
    trained.to_parquet(folder / "data" / "train.parquet")
    split = {"format": "conversational", "bos_per_sequence": 1}
    write_json(folder / "data" / "report.json", {"max_prompt_length": None, "splits": {"train": split}})
    values = {
        "name": "tiny",
        "method": "dpo",
        "model": {"name_or_path": str(folder / "reference")},
        "train": {},
        "evaluate": {"max_new_tokens": 8, "batch_size": 6, "bootstrap_samples": 50},
    }
    return folder, check_experiment(values, where="test")


def test_evaluate_writes_what_it_says(experiment, tmp_path):
    folder, settings = experiment
    result = evaluate(settings, folder / "data", folder / "train", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "annotations.json",
        "generated.jsonl",
        "responses.parquet",
        "summary.json",
    }
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8")) == result.summary
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "responses.parquet"), result.responses)
    annotations = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))

    summary, responses = result.summary, result.responses
    assert summary["n_total"] == summary["n_scored"] == len(annotations) == len(responses) == 20
    recomputed = [
        1.0 + second_wins_by_rewards(row.reference_gold, row.policy_gold, WorldSection().label_temperature)
        for row in responses.itertuples()
    ]
    assert responses["preference"].tolist() == pytest.approx(recomputed)
    assert [row["prompt_id"] for row in annotations] == responses["prompt_id"].tolist()
    assert [row["preference"] for row in annotations] == pytest.approx(recomputed)
    assert summary["win_rate"] == pytest.approx(100.0 * (sum(recomputed) / 20 - 1.0))
    assert responses["policy_gold"].tolist() == [
        gold_score(row.instruction, row.policy_response) for row in responses.itertuples()
    ]
    assert summary["reverse_kl_per_token"] == pytest.approx(
        responses["reverse_kl"].sum() / responses["policy_tokens"].sum()
    )
    forward = responses["forward_kl"]
    assert summary["forward_kl_per_response"] == pytest.approx(forward.mean())
    assert summary["forward_kl_per_token"] == pytest.approx(forward.sum() / responses["reference_tokens"].sum())
    for end in (
        "per_response",
        "per_response_low",
        "per_response_high",
        "per_token",
        "per_token_low",
        "per_token_high",
    ):
        assert summary[f"reverse_kl_{end}"] != summary[f"forward_kl_{end}"]
    intervals = [key.removesuffix("_low") for key in summary if key.endswith("_low")]
    assert len(intervals) == 10
    assert all(summary[f"{key}_low"] <= summary[key] <= summary[f"{key}_high"] for key in intervals)
    shown = headline(summary)["value"]
    assert shown["win rate (%)"] == f"{summary['win_rate']:.1f}"
    assert shown["length-controlled win rate, length-only (%)"] == f"{summary['length_controlled_win_rate']:.1f}"


def test_divergences_are_measured_on_the_right_models_responses(experiment, tmp_path):
    folder, settings = experiment
    result = evaluate(settings, folder / "data", folder / "train", tmp_path)
    generated = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(generated) == 2 * 20 and {line["bos"] for line in generated} == {1}
    models = [LlamaForCausalLM.from_pretrained(folder / name) for name in ("train/model", "reference")]
    said = {(line["made_by"]["seed"], line["prompt"]): line for line in generated}
    row = result.responses.iloc[3]
    prompt = f"<bos><user> {row['instruction']} <assistant>"
    for column, seed, order in (("reverse_kl", settings.seed, models), ("forward_kl", settings.seed + 1, models[::-1])):
        line = said[seed, prompt]
        assert row[column] == pytest.approx(
            kl_from_full_logits(*order, line["prompt_ids"], line["token_ids"]), rel=1e-4
        )


def test_a_killed_evaluation_goes_on_from_its_responses(experiment, tmp_path):
    folder, settings = experiment
    whole = evaluate(settings, folder / "data", folder / "train", tmp_path / "whole")
    lines = (tmp_path / "whole" / "generated.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "generated.jsonl").write_text("".join(lines[:26]) + lines[26][:50], encoding="utf-8")
    killed = evaluate(settings, folder / "data", folder / "train", tmp_path / "killed")
    pd.testing.assert_frame_equal(killed.responses, whole.responses, check_exact=True)
    assert (tmp_path / "killed" / "generated.jsonl").read_text(encoding="utf-8") == "".join(lines)


def test_prompts_without_a_judge_are_answered_and_measured(experiment, tmp_path):
    """AlpacaEval's format; asked in the form that the model was trained in."""
    folder, settings = experiment
    rows = [
        {"instruction": text, "output": "blue", "dataset": "koala"} for text in ("cat", "count up", "fig oak", "cat")
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")
    prompts = PromptsSection(source=str(tmp_path / "prompts.json"))
    settings = settings.model_copy(
        update={"evaluate": settings.evaluate.model_copy(update={"prompts": prompts, "judge": None})}
    )
    result = evaluate(settings, folder / "data", folder / "train", tmp_path / "out")
    summary, responses = result.summary, result.responses
    assert json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8")) == summary
    assert summary["judge"] is None and not [key for key in summary if "win_rate" in key or "gold" in key]
    assert not (tmp_path / "out" / "annotations.json").exists()
    assert (summary["n_total"], summary["prompts"]["duplicates"], summary["prompts"]["bos_per_prompt"]) == (4, 1, 1)
    assert summary["prompts"]["first_as_rendered"] == "<bos><user> cat <assistant>"
    assert responses["given_response"].tolist() == ["blue"] * 4 and responses["task"].tolist() == ["koala"] * 4
    assert responses["policy_response"][0] == responses["policy_response"][3]
    assert summary["forward_kl_per_response"] > 0.0 < summary["reverse_kl_per_response"]
    table = headline(summary)
    assert "win rate (%)" not in table.index
    assert table.loc["KL(π_ref‖π) per response (nats)", "value"] == f"{summary['forward_kl_per_response']:.3f}"


def test_evaluate_is_repeatable(experiment, tmp_path):
    folder, settings = experiment
    first, second = (evaluate(settings, folder / "data", folder / "train", tmp_path / name) for name in "ab")
    pd.testing.assert_frame_equal(first.responses, second.responses)
    times = {"sampling_seconds", "kl_seconds", "judged_from", "judged_until"}
    assert {key: first.summary[key] for key in first.summary.keys() - times} == {
        key: second.summary[key] for key in second.summary.keys() - times
    }


def test_untrained_policy_is_level_with_its_reference_at_no_divergence(experiment, tmp_path):
    folder, settings = experiment
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "model").symlink_to(folder / "reference", target_is_directory=True)
    result = evaluate(settings, folder / "data", tmp_path / "train", tmp_path / "out")
    assert result.summary["reverse_kl_per_response"] == 0.0
    assert result.summary["win_rate_low"] < 50.0 < result.summary["win_rate_high"]
    # Independent samples: the policy must not be handed the reference's random numbers.
    assert (result.responses["policy_response"] != result.responses["reference_response"]).mean() > 0.5


def test_evaluate_refuses_before_work(experiment, tmp_path):
    folder, settings = experiment
    with pytest.raises(FileNotFoundError, match="no held-out prompts"):
        evaluate(settings, tmp_path, folder / "train", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no trained policy"):
        evaluate(settings, folder / "data", tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no `evaluate` section"):
        evaluate(settings.model_copy(update={"evaluate": None}), folder / "data", folder / "train", tmp_path / "out")
    prompts = pd.read_parquet(folder / "data" / "prompts.parquet")
    prompts.head(1).to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(ValueError, match="holds 1 prompts"):
        evaluate(settings, tmp_path, folder / "train", tmp_path / "out")
    prompts.assign(instruction="write a poem").to_parquet(tmp_path / "prompts.parquet")
    with pytest.raises(ValueError, match="write a poem"):
        evaluate(settings, tmp_path, folder / "train", tmp_path / "out")
    assert not (tmp_path / "out").exists()
