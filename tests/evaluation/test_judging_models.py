"""Judges that run here, on tiny models: against a server with the same model, and against forwards by hand."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from kit.chat_server import ChatServer
from kit.model_server import model_replies
from kit.official import OFFICIAL
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from epsdpo.evaluation.calibration import calibrate
from epsdpo.evaluation.judge import load_judge
from epsdpo.evaluation.judges.answers import IMPROBABLE, NEITHER
from epsdpo.evaluation.judges.ask import content_key, judge_comparisons
from epsdpo.evaluation.judges.chat import ChatJudge
from epsdpo.evaluation.judges.comparison import Comparison, Presentation
from epsdpo.evaluation.judges.counts import summarise
from epsdpo.evaluation.judges.pair_ranker import FIRST, SECOND, SOURCE, PairRankerModel
from epsdpo.experiment import ConfigError
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.batches import chat_ids

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
PUBLISHED = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "alpaca_eval_judge.json.gz").read_bytes()))
OFFICIAL_PREFERENCES = [row["preference"] for row in PUBLISHED["comparisons"]]
COMPARISONS = [Comparison(row["instruction"], row["output_1"], row["output_2"]) for row in PUBLISHED["comparisons"]]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory, tokenizer):
    """A folder with a random model for which m and M are often, but not always, the likeliest tokens."""
    torch.manual_seed(4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1000, **SIZES)).eval()
    with torch.no_grad():
        for identifier in "mM":
            model.lm_head.weight[tokenizer.encode(identifier)[0]] *= 4.0
    return save(tmp_path_factory.mktemp("causal_lm"), model, tokenizer), model


def section(kind, folder, **changes):
    return JudgeSection(**{"kind": kind, "model": folder, "batch_size": 7, **changes})


# ------------------------------------------------------------------------------------------- a causal language model


def test_judge_here_and_behind_a_server_agree(causal_lm, tokenizer, tmp_path):
    """The same model, read in padded batches here and one by one there, in both orders."""
    folder, model = causal_lm
    items = COMPARISONS[::2]
    here = judge_comparisons(items, load_judge(section("causal_lm", folder, order="both", top_logprobs=20), 1.0))
    with ChatServer(model_replies(model, tokenizer)) as server:
        settings = JudgeSection(kind="chat", model="tiny", base_url=server.url, order="both", top_logprobs=20)
        there = judge_comparisons(items, ChatJudge(settings), tmp_path)
        assert len(server.bodies) == 2 * len(set(items))
    too_long = [item.failure is not None and "context" in item.failure.reason for item in here]
    assert 0 < sum(too_long) < 10  # the server has no limit of its own
    reasons = set()
    for ours, theirs, beyond in zip(here, there, too_long, strict=True):
        if not beyond and ours.preference is not None:
            assert ours.preference == pytest.approx(theirs.preference, abs=1e-4)
        elif not beyond:
            assert ours.failure.reason == theirs.failure.reason
            reasons.add(ours.failure.reason)
    assert reasons == {NEITHER, IMPROBABLE}
    scored = [item.preference is not None for item in there]
    assert 5 < sum(scored) < len(scored)
    assert len({round(item.preference, 3) for item in there if item.preference is not None}) > 5

    calibration = calibrate(OFFICIAL_PREFERENCES[::2], [item.preference for item in there], samples=200)
    assert calibration.n_scored == sum(scored) == summarise(there)["n_scored"]
    assert abs(calibration.correlation.value) < 0.6  # a random judge knows nothing


def test_text_of_a_served_model_is_no_answer(causal_lm, tokenizer, tmp_path):
    folder, model = causal_lm
    with ChatServer(model_replies(model, tokenizer)) as server:
        settings = JudgeSection(kind="chat", model="tiny", base_url=server.url, mode="text", max_tokens=6)
        judgements = judge_comparisons(COMPARISONS[:5], ChatJudge(settings), tmp_path)
    assert {item.failure.reason for item in judgements} == {"answer is no identifier"}


def test_what_does_not_fit_fails(causal_lm):
    folder, _ = causal_lm
    items = [Comparison("q", "short", "long " * 1200), COMPARISONS[-1]]
    judgements = judge_comparisons(items, load_judge(section("causal_lm", folder, top_logprobs=20), 1.0))
    assert judgements[0].failure.reason == "longer than the judge's context"
    assert "the model reads 1000" in judgements[0].failure.detail
    assert judgements[1].failure is None or "context" not in judgements[1].failure.reason


def test_system_message_joins_the_user_where_a_template_has_no_role_for_it(tokenizer):
    strict = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict.chat_template = refusal + TEMPLATE
    user = {"role": "user", "content": "which is better?"}
    joined = [{"role": "user", "content": "you are a judge\n\nwhich is better?"}]
    ids = chat_ids(strict, [{"role": "system", "content": "you are a judge"}, user], answer_next=True)
    assert ids == chat_ids(tokenizer, joined, answer_next=True)
    assert tokenizer.decode(ids) == "user: you are a judge\n\nwhich is better?\nassistant: "


def test_the_key_follows_the_weights_and_not_the_folder(causal_lm, tokenizer, tmp_path):
    folder, model = causal_lm
    presentation = Presentation(COMPARISONS[0], False)
    copy = save(tmp_path / "copy", model, tokenizer)
    keys = [
        content_key(load_judge(section("causal_lm", name), 1.0).request(presentation), presentation)
        for name in (folder, copy)
    ]
    assert keys[0] == keys[1]
    changed = LlamaForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        changed.lm_head.weight[5, 5] += 1.0
    changed.save_pretrained(copy)
    assert content_key(load_judge(section("causal_lm", copy), 1.0).request(presentation), presentation) != keys[0]


# ------------------------------------------------------------------------------------------------------ a reward model


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer):
    torch.manual_seed(1)
    sizes = SIZES | {"pad_token_id": None}  # as a checkpoint has it that was trained without padding
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=400, num_labels=1, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    return save(tmp_path_factory.mktemp("reward_model"), model, tokenizer), model


def test_rewards_are_those_of_each_text_alone(reward_model, tokenizer):
    """Bradley-Terry: 1 + σ(difference of rewards), each from a forward of its own, without padding."""
    folder, model = reward_model
    judgements = judge_comparisons(COMPARISONS[::3], load_judge(section("reward_model", folder), 1.0))

    def reward(instruction, output):
        ids = tokenizer(f"user: {instruction}\nassistant: {output}\n", return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            return ids["input_ids"].shape[1], model(ids["input_ids"]).logits.item()

    fitted = 0
    for item, judgement in zip(COMPARISONS[::3], judgements, strict=True):
        (long_1, one), (long_2, two) = (
            reward(item.instruction, text) for text in (item.reference_output, item.model_output)
        )
        if max(long_1, long_2) > 400:
            assert judgement.failure.reason == "longer than the judge's context"
            continue
        fitted += 1
        assert judgement.preference == pytest.approx(1.0 + 1.0 / (1.0 + math.exp(one - two)), abs=1e-4)
        assert judgement.records[False]["answer"]["rewards"] == pytest.approx([one, two], abs=1e-3)
    assert 0 < fitted < 13


def test_reward_model_without_a_chat_template_reads_a_pair(reward_model, tmp_path):
    _, model = reward_model
    plain = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    folder = save(tmp_path / "plain", model, plain)
    (judgement,) = judge_comparisons([Comparison("q", "one", "two")], load_judge(section("reward_model", folder), 1.0))
    with torch.no_grad():
        rewards = [model(plain("q", text, return_tensors="pt")["input_ids"]).logits.item() for text in ("one", "two")]
    assert judgement.records[False]["answer"]["rewards"] == pytest.approx(rewards, abs=1e-3)


def test_a_model_that_would_judge_by_random_numbers_is_refused(causal_lm, reward_model, tokenizer, tmp_path):
    folder, _ = causal_lm
    with pytest.raises(
        ConfigError, match=r"has no score\.weight, so as AutoModelForSequenceClassification it would judge"
    ):
        load_judge(section("reward_model", folder), 1.0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=3, **SIZES)
    three = save(tmp_path / "three", LlamaForSequenceClassification(config), tokenizer)
    with pytest.raises(ConfigError, match="has 3 labels"):
        load_judge(section("reward_model", three), 1.0)
    with pytest.raises(ConfigError, match="cannot load"):
        (tmp_path / "empty").mkdir()
        load_judge(section("causal_lm", str(tmp_path / "empty")), 1.0)


# ------------------------------------------------------------------------------------------------------- a pair ranker


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    """A random ranker in PairRM's form, and a tokenizer of words with its markers."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green", "blue", "which", "colour", "is", "best"]
    core = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_tokens([SOURCE, FIRST, SECOND], special_tokens=True)
    torch.manual_seed(2)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        **SIZES | {"num_hidden_layers": 1, "num_attention_heads": 1},
    )
    config.drop_out, config.n_tasks = 0.05, 1
    markers = tokenizer.convert_tokens_to_ids([SOURCE, FIRST, SECOND])
    config.source_prefix_id, config.cand1_prefix_id, config.cand2_prefix_id = markers
    model = PairRankerModel(config).eval()
    return save(tmp_path_factory.mktemp("ranker"), model, tokenizer), model, tokenizer


COLOURS = [
    Comparison("which colour is best", first, second)
    for first, second in [("red", "green"), ("blue blue", "red"), ("green is best", "blue"), ("red red red", "is")]
]


def test_pair_ranker_reads_the_published_form(ranker):
    """[CLS] source … [SEP] [CLS] candidate1 … [SEP] [CLS] candidate2 … [SEP], and a head on pairs of marker states."""
    folder, model, tokenizer = ranker
    judgements = judge_comparisons(COLOURS, load_judge(section("pair_ranker", folder, order="both"), 1.0))

    def log_odds_first(instruction, first, second):
        ids = [
            *tokenizer.encode(SOURCE + instruction),
            *tokenizer.encode(FIRST + first),
            *tokenizer.encode(SECOND + second),
        ]
        assert [tokenizer.decode([token]) for token in ids[:3]] == ["[CLS]", SOURCE, "which"]
        with torch.no_grad():
            states = model.pretrained_model(torch.tensor([ids])).last_hidden_state[0]
            source, one, two = (
                states[ids.index(tokenizer.convert_tokens_to_ids(name))] for name in (SOURCE, FIRST, SECOND)
            )
            layers = [model.head_layer[1], torch.tanh, model.head_layer[4]]
            scores = [torch.cat([source, one]), torch.cat([source, two])]
            for layer in layers:
                scores = [layer(score) for score in scores]
        return (scores[0] - scores[1]).item()

    preferences = []
    for item, judgement in zip(COLOURS, judgements, strict=True):
        plain = log_odds_first(item.instruction, item.reference_output, item.model_output)
        switched = log_odds_first(item.instruction, item.model_output, item.reference_output)
        wins = [1.0 / (1.0 + math.exp(plain)), 1.0 / (1.0 + math.exp(-switched))]
        assert judgement.preference == pytest.approx(1.0 + sum(wins) / 2.0, abs=1e-5)
        preferences.append(judgement.preference)
    assert max(preferences) - min(preferences) > 0.01


def test_pair_ranker_cuts_by_the_published_budget_and_says_so(ranker):
    folder, model, tokenizer = ranker
    judge = load_judge(section("pair_ranker", folder, order="both"), 1.0)
    # With marker and two special tokens, the instruction is one word longer than 1224, an output longer than 412.
    instruction, long = " ".join(["which"] * 1222), " ".join(["red"] * 500)
    fitting = Comparison(instruction.removesuffix(" which"), " ".join(["red"] * 409), "blue")
    items = [Comparison(instruction, long, "blue"), fitting, Comparison("best", long, "blue")]
    judgements = judge_comparisons([*items, Comparison("best", SECOND, "red")], judge)
    cut = [[record["answer"]["cut"] for record in item.records.values()] for item in judgements]
    assert cut == [[True, True], [False, False], [False, False], []]
    assert judgements[0].preference == pytest.approx(judgements[1].preference, abs=1e-6)
    assert judgements[3].failure.reason == "text holds a marker of the pair ranker"
    assert summarise(judgements)["n_cut"] == 2


def test_a_model_that_is_no_pair_ranker_is_refused(ranker, causal_lm, tmp_path):
    _, model, _ = ranker
    with pytest.raises(ConfigError, match="its config has no drop_out, n_tasks"):
        load_judge(section("pair_ranker", causal_lm[0]), 1.0)
    wrong = save(tmp_path / "wrong", model, AutoTokenizer.from_pretrained(OFFICIAL / "tok"))
    with pytest.raises(ConfigError, match="PairRM-hf"):
        load_judge(section("pair_ranker", wrong), 1.0)
