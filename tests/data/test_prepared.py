"""Preparing data: every format, every reason to refuse a row, and token ids equal to TRL's own."""

import gzip
import json
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from epsdpo.data.prepared import DataError, counts_table, load_prepared, prepare, refusals_table, token_lengths
from epsdpo.experiment import DataSection

HH_ROWS = Path(__file__).parents[1] / "data" / "hh_rows.jsonl"

CORPUS = ["the cat sat on the mat", "name three fruits", "apple pear plum", "what is the weather like today"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    """Byte-level BPE with a few merges, which puts BOS before plain text, and a chat template that does so too."""
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


STANDARD_ROWS = [
    {"prompt": "name three fruits:", "chosen": " apple pear plum", "rejected": " the cat"},
    {"prompt": "what is the weather", "chosen": " like today<eos>", "rejected": " sat on the mat"},
]
CONVERSATIONS = [
    {
        "prompt": [user("name three fruits")],
        "chosen": [assistant("apple pear plum")],
        "rejected": [assistant("the cat")],
    },
    {
        "prompt": [user("what is it"), assistant("a cat"), user("what cat")],
        "chosen": [assistant("the cat on the mat")],
        "rejected": [assistant("apple")],
    },
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare_rows(tmp_path, rows, tokenizer, max_length=None, **section):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    return prepare(DataSection(source=str(source), **section), tokenizer, tmp_path / "out", max_length=max_length)


def refused(prepared):
    return {reason: entry["rows"] for reason, entry in prepared.report["splits"]["train"]["refused"].items()}


# ----------------------------------------------------------------------------------------------------------- formats


def test_standard_rows_get_one_bos_and_one_eos(tmp_path, tokenizer):
    prepared = prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert prepared.report["splits"]["train"]["format"] == "standard"
    assert prepared.report["splits"]["train"]["bos_per_sequence"] == 1
    for row, source in zip(prepared.train, STANDARD_ROWS, strict=True):
        assert row["prompt_ids"].count(bos) == 1 and row["prompt_ids"][0] == bos
        assert tokenizer.decode(row["prompt_ids"][1:]) == source["prompt"]
        for part in ("chosen", "rejected"):
            assert row[f"{part}_ids"].count(eos) == 1 and row[f"{part}_ids"][-1] == eos
            assert tokenizer.decode(row[f"{part}_ids"][:-1]) == source[part].removesuffix("<eos>")
    assert prepared.train[1]["chosen"] == " like today<eos>"


def test_conversations_are_rendered_by_the_template_and_get_no_second_eos(tmp_path, tokenizer):
    prepared = prepare_rows(tmp_path, CONVERSATIONS, tokenizer)
    row = prepared.train[1]
    assert prepared.report["splits"]["train"]["format"] == "conversational"
    assert row["prompt"] == "<bos><|user|>what is it<eos><|assistant|>a cat<eos><|user|>what cat<eos><|assistant|>"
    assert row["chosen"] == "the cat on the mat<eos>"
    assert tokenizer.decode(row["prompt_ids"]) == row["prompt"]
    assert tokenizer.decode(row["chosen_ids"]) == row["chosen"]
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_whole_conversations_give_the_same_ids_as_a_prompt_apart(tmp_path, tokenizer):
    whole = [
        {
            "prompt": row["prompt"][0]["content"],  # as in princeton-nlp/llama3-ultrafeedback
            "chosen": row["prompt"] + row["chosen"],
            "rejected": row["prompt"] + row["rejected"],
        }
        for row in CONVERSATIONS
    ]
    whole.append({**whole[0], "prompt": "something else"})
    prepared = prepare_rows(tmp_path, whole, tokenizer)
    apart = prepare_rows(tmp_path, [*CONVERSATIONS, CONVERSATIONS[0]], tokenizer)
    assert prepared.report["splits"]["train"]["prompt_text_differs"] == 1
    assert apart.report["splits"]["train"]["prompt_text_differs"] == 0
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert prepared.train[column][:] == apart.train[column][:]


def test_hh_transcripts(tmp_path, tokenizer):
    """14 real rows: one empty answer, one pair of different length, two with two assistant turns in a row."""
    prepared = prepare(DataSection(source=str(HH_ROWS)), tokenizer, tmp_path, max_length=None)
    split = prepared.report["splits"]["train"]
    assert split["format"] == "transcripts in the manner of Anthropic HH"
    assert (split["rows_read"], split["rows_kept"]) == (14, 12)
    assert {reason: entry["examples"] for reason, entry in split["refused"].items()} == {
        "empty_chosen": [4],
        "prompts_differ": [7],
    }
    rows = {row["pair_id"]: row for row in prepared.train}
    assert rows["train-1"]["prompt"] == "<bos><|user|>Is it possible to download a car?<eos><|assistant|>"
    assert rows["train-1"]["chosen"] == "I’m not sure what you mean. Can you clarify?<eos>"
    assert rows["train-1"]["rejected"] == "I’m sorry, I don’t understand.<eos>"
    # A header within a line is text; only one that opens a paragraph begins a turn.
    assert rows["train-5"]["chosen"].startswith("Human: I'm so sorry to hear that!")
    assert "<|assistant|>Here’s a short joke from a friend:<eos><|assistant|>“Question:" in rows["train-6"]["prompt"]
    assert not any("\n\nHuman:" in row["prompt"] or "\n\nAssistant:" in row["prompt"] for row in prepared.train)


# ---------------------------------------------------------------------------------------------------------- refusals


def test_standard_refusals_are_counted_by_reason(tmp_path, tokenizer):
    good = STANDARD_ROWS[0]
    rows = [
        good,
        {**good, "prompt": " "},
        {**good, "chosen": ""},
        {**good, "rejected": "\n"},
        {**good, "chosen": "a", "rejected": "a"},
        {**good, "chosen": None},
        {"prompt": good["prompt"], "chosen": "a"},
        {**good, "rejected": 7},
        {**good, "chosen": "half a \ud83d pair"},
        {**good, "prompt": "<bos>name"},
        {**good, "prompt": "x" * 40},
        {**good, "chosen": " cat<eos>", "rejected": " cat"},
    ]
    prepared = prepare_rows(tmp_path, rows, tokenizer, max_length=41)
    assert refused(prepared) == {
        "missing_value": 2,
        "wrong_type": 2,
        "empty_prompt": 1,
        "empty_chosen": 1,
        "empty_rejected": 1,
        "identical_pair": 2,
        "two_bos": 1,
        "prompt_fills_max_length": 1,
    }
    assert prepared.train["pair_id"][:] == ["train-0"]
    counts = counts_table(prepared.report).iloc[0]
    assert (counts["rows read"], counts["kept"], counts["refused"]) == (12, 1, 11)
    table = refusals_table(prepared.report).set_index("reason")
    assert table.loc["missing_value", "first rows"] == "5, 6"
    assert table["rows"].sum() == 11


def test_conversational_refusals_are_counted_by_reason(tmp_path, tokenizer):
    good = CONVERSATIONS[0]
    rows = [
        good,
        {**good, "chosen": [user("apple")]},
        {**good, "chosen": [user("name three fruits"), assistant("apple")]},
        {**good, "rejected": "the cat"},
        {**good, "prompt": [{"role": "user"}]},
        {**good, "prompt": []},
        {**good, "chosen": [assistant(" ")]},
        {**good, "rejected": good["chosen"]},
        {**good, "prompt": [{"role": "system", "content": "be brief"}, *good["prompt"]]},
    ]
    prepared = prepare_rows(tmp_path, rows, tokenizer)
    assert refused(prepared) == {
        "wrong_type": 2,
        "no_assistant_turn": 2,
        "empty_prompt": 1,
        "empty_chosen": 1,
        "identical_pair": 1,
        "template_refuses": 1,
    }
    entry = prepared.report["splits"]["train"]["refused"]["template_refuses"]
    assert entry["message"] == "no system turns here" and entry["examples"] == [8]


def test_whole_conversations_with_other_prompts_or_without_an_answer_are_refused(tmp_path, tokenizer):
    rows = [
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("A"), assistant("c")]},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b"), user("d"), assistant("c")]},
        {"chosen": [user("a")], "rejected": [user("a"), assistant("c")]},
        {"chosen": [assistant("b")], "rejected": [assistant("c")]},
    ]
    prepared = prepare_rows(tmp_path, rows, tokenizer)
    assert refused(prepared) == {"no_assistant_turn": 1, "prompts_differ": 2, "empty_prompt": 1}


PARTS_OF_TEXT = [{"type": "text", "text": "name three fruits"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": [user(PARTS_OF_TEXT)]},
            "prompt, message 0, content is a list of an object with type, text, that is parts",
        ),
        (
            {"chosen": [assistant(PARTS_OF_TEXT)]},
            "chosen, message 0, content is a list .* should be one text: join them",
        ),
        (
            {"chosen": [{"from": "gpt", "value": "a"}]},
            "chosen, message 0, is an object with from, value, and should have role and content .from: human is role",
        ),
        (
            {"rejected": ["one", "two"]},
            "rejected is a list of texts, and should be a list of messages with role and content",
        ),
        ({"rejected": "the cat"}, "rejected is text, and should be a list of messages"),
        (
            {"rejected": {"role": "assistant", "content": "a"}},
            "rejected is an object with role, content, and should be a list",
        ),
        ({"rejected": [assistant(7)]}, r"rejected, message 0, content is 7 \(int\), and should be text"),
        ({"rejected": None}, "rejected is null"),
        ({"pair_id": 1.0}, r"pair_id is 1.0 \(float\), and should be text or a whole number"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_should_be(tmp_path, tokenizer, changes, message):
    rows = [{"pair_id": 0, **CONVERSATIONS[0]}, {"pair_id": 1, **CONVERSATIONS[0], **changes}]
    prepared = prepare_rows(tmp_path, rows, tokenizer)
    [entry] = prepared.report["splits"]["train"]["refused"].values()
    assert re.search(message, entry["message"]) and entry["examples"] == [1]
    assert entry["message"] in refusals_table(prepared.report)["meaning"].iloc[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": ["b"], "rejected": ["c"]},
            "chosen is a list of texts, and should be a list of messages",
        ),
        (
            {"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "prompt is text, and chosen and rejected are messages without it. It should be a list of messages too",
        ),
        (
            {"prompt": "a", "chosen": json.dumps([assistant("b")]), "rejected": json.dumps([assistant("c")])},
            "chosen is the JSON text of a list of messages, and should be that list itself",
        ),
        (
            {"chosen": json.dumps([user("a"), assistant("b")]), "rejected": json.dumps([user("a"), assistant("c")])},
            "chosen is the JSON text of a list of messages, and should be that list itself",
        ),
        (
            {"prompt": "half \ud83d", "chosen": "b", "rejected": "c"},
            "prompt is not valid Unicode: its character 5 is half",
        ),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, r"prompt is 7 \(int\), and should be text"),
    ],
)
def test_where_all_rows_are_wrong_the_refusal_says_how(tmp_path, tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        prepare_rows(tmp_path, [row], tokenizer)


def test_a_prompt_whose_tokens_are_lost_is_not_said_to_have_no_text(tmp_path, tokenizer):
    tokenizer.chat_template = "{% if add_generation_prompt %}the{% else %}mat{% endif %}" + TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    with pytest.raises(DataError, match="it has text, which is written otherwise once it is answered"):
        prepare_rows(tmp_path, CONVERSATIONS, tokenizer)


def test_odd_transcripts_are_refused(tmp_path, tokenizer):
    good = "\n\nHuman: a\n\nAssistant: b"
    rows = [
        {"chosen": good, "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": good, "rejected": "Human: a"},
        {"chosen": good, "rejected": "before\n\nHuman: a\n\nAssistant: c"},
        {"chosen": good, "rejected": "\n\nHuman: a"},
        {"chosen": good, "rejected": "\n\nHuman: a\n\nAssistant:"},
        {"chosen": good, "rejected": "\n\nHuman: a\n\nAssistant:  b\n"},
    ]
    prepared = prepare_rows(tmp_path, rows, tokenizer)
    assert refused(prepared) == {
        "not_a_transcript": 2,
        "no_assistant_turn": 1,
        "empty_rejected": 1,
        "identical_pair": 1,
    }


def test_nothing_left_is_an_error_with_the_reasons(tmp_path, tokenizer):
    rows = [{**STANDARD_ROWS[0], "chosen": ""}, {**STANDARD_ROWS[0], "prompt": "<bos>name"}]
    with pytest.raises(DataError, match=r"(?s)none of 2 rows.*empty_chosen: 1 rows, first \[0\].*two_bos: 1 rows"):
        prepare_rows(tmp_path, rows, tokenizer)
    with pytest.raises(DataError, match="holds no report.json"):
        load_prepared(tmp_path / "out")


def test_texts_that_bring_their_own_bos_beside_texts_that_do_not_are_refused(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    rows = [STANDARD_ROWS[0], {**STANDARD_ROWS[0], "prompt": "<bos>name"}]
    with pytest.raises(DataError, match="row 1 starts with BOS, row 0 does not"):
        prepare_rows(tmp_path, rows, tokenizer)


# -------------------------------------------------------------------------------------------------- cuts and TRL's ids


def test_the_prompt_is_cut_from_the_left(tmp_path, tokenizer):
    whole = prepare_rows(tmp_path, CONVERSATIONS, tokenizer).train
    lengths = [len(ids) for ids in whole["prompt_ids"]]
    limit = min(lengths)  # the first prompt fits exactly, the second is cut and loses its BOS
    assert lengths[1] > limit
    prepared = prepare_rows(tmp_path, CONVERSATIONS, tokenizer, max_prompt_length=limit)
    assert prepared.train["prompt_ids"][:] == [whole[0]["prompt_ids"], whole[1]["prompt_ids"][-limit:]]
    assert prepared.train["chosen_ids"][:] == whole["chosen_ids"][:]
    assert prepared.train[1]["prompt_ids"][0] != tokenizer.bos_token_id
    assert prepared.report["splits"]["train"]["truncated"] == {"prompt": 1, "completion": 0}


def test_completions_that_max_length_will_cut_are_kept_whole_and_counted(tmp_path, tokenizer):
    whole = prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    totals = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in whole.train]
    longest = max(totals)
    assert min(totals) < longest
    for max_length, cut in ((longest, 0), (longest - 1, 1)):
        prepared = prepare_rows(tmp_path, STANDARD_ROWS, tokenizer, max_length=max_length)
        assert prepared.report["splits"]["train"]["truncated"] == {"prompt": 0, "completion": cut}
        assert prepared.train["chosen_ids"][:] == whole.train["chosen_ids"][:]


def test_a_prompt_that_merges_into_the_completion_is_counted(tmp_path, tokenizer):
    rows = [STANDARD_ROWS[0], {"prompt": "the cat sat on th", "chosen": "e mat", "rejected": "e cat"}]
    prepared = prepare_rows(tmp_path, rows, tokenizer)
    split = prepared.report["splits"]["train"]
    assert split["prompt_not_a_prefix"]["rows"] == 1
    assert split["prompt_not_a_prefix"]["example"]["row"] == 1
    row = prepared.train[1]
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]) == "<bos>the cat sat on the mat<eos>"
    assert "the cat sat on th".endswith(split["prompt_not_a_prefix"]["example"]["left_out"])


@pytest.mark.parametrize("rows", [STANDARD_ROWS, CONVERSATIONS], ids=["standard", "conversational"])
def test_ids_equal_those_of_trl(tmp_path, tokenizer, rows):
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    if rows is STANDARD_ROWS:  # with a prompt that is no prefix of prompt + completion
        rows = [*rows, {"prompt": "the cat sat on th", "chosen": "e mat", "rejected": "e cat"}]
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)) for _ in range(2))
    settings = DPOConfig(output_dir=str(tmp_path / "trl"), max_length=None, bf16=False, use_cpu=True, report_to="none")
    trl = DPOTrainer(
        model=model,
        ref_model=reference,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    ours = prepare_rows(tmp_path, rows, tokenizer)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours.train[column][:] == trl.train_dataset[column][:]


# ----------------------------------------------------------------------------------------------------------- sources


def test_every_file_type_gives_the_same_prepared_data(tmp_path, tokenizer):
    rows = [{**row, "id": number} for number, row in enumerate(CONVERSATIONS)]
    table = pa.Table.from_pylist(rows)
    lines = write_jsonl(tmp_path / "a.jsonl", rows).read_bytes()
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(table, tmp_path / "d.parquet")
    feather.write_feather(table, tmp_path / "e.arrow")
    with pa.ipc.new_stream(tmp_path / "f.arrow", table.schema) as stream:
        stream.write_table(table)
    section = {"columns": {"pair_id": "id"}}
    files = sorted(path for path in tmp_path.iterdir())
    prepared = [
        prepare(DataSection(source=str(file), **section), tokenizer, tmp_path / f"out-{file.name}", max_length=64)
        for file in files
    ]
    assert len(files) == 6
    assert prepared[0].train["pair_id"][:] == ["0", "1"]
    for other in prepared[1:]:
        assert other.train.to_list() == prepared[0].train.to_list()
        assert other.report["splits"] == prepared[0].report["splits"]


def test_a_folder_has_a_file_per_split(tmp_path, tokenizer):
    folder = tmp_path / "set" / "harmless-base"
    folder.mkdir(parents=True)
    for shard, row in enumerate(STANDARD_ROWS):
        pq.write_table(pa.Table.from_pylist([row]), folder / f"train_prefs-0000{shard}-of-00002.parquet")
    write_jsonl(folder / "test_prefs.jsonl", STANDARD_ROWS)
    section = {"source": str(tmp_path / "set"), "subset": "harmless-base", "train_split": "train_prefs"}
    prepared = prepare(
        DataSection(**section, eval_split="test_prefs", max_eval_pairs=1), tokenizer, tmp_path / "out", max_length=None
    )
    assert prepared.train["pair_id"][:] == ["train_prefs-0", "train_prefs-1"]
    assert prepared.eval["pair_id"][:] == ["test_prefs-0"]
    assert prepared.eval[0]["chosen_ids"] == prepared.train[0]["chosen_ids"]
    with pytest.raises(DataError, match="no split 'dev' in .*harmless-base, but test_prefs, train_prefs"):
        prepare(DataSection(**section, eval_split="dev"), tokenizer, tmp_path / "out", max_length=None)


def test_a_downloaded_repository_is_read_by_its_subset(tmp_path, tokenizer):
    """README.md beside data/, whose shards have hashes: one split, and all its shards."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Pairs", encoding="utf-8")
    for shard, row in enumerate(STANDARD_ROWS):
        name = f"train-0000{shard}-of-00002-{'a09b74b3ef9c3b5' + str(shard)}.parquet"
        pq.write_table(pa.Table.from_pylist([row]), folder / "data" / name)
    with pytest.raises(
        DataError, match="no split 'train' in .*, but no data files. data below it has one: set data.subset: data"
    ):
        prepare(DataSection(source=str(folder)), tokenizer, tmp_path / "out", max_length=None)
    section = DataSection(source=str(folder), subset="data")
    prepared = prepare(section, tokenizer, tmp_path / "out", max_length=None)
    assert prepared.train["pair_id"][:] == ["train-0", "train-1"]
    (folder / "data" / "train-00001-of-00002-a09b74b3ef9c3b51.parquet").unlink()
    with pytest.raises(DataError, match="1 of 2 shards missing, beside train-00000-of-00002-.*: 00001"):
        prepare(section, tokenizer, tmp_path / "out", max_length=None)


def test_what_save_to_disk_wrote(tmp_path, tokenizer):
    train = Dataset.from_list(STANDARD_ROWS * 3)
    DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(
        tmp_path / "dict", num_shards={"train": 2, "test": 1}
    )
    section = DataSection(source=str(tmp_path / "dict"), eval_split="test")
    prepared = prepare(section, tokenizer, tmp_path / "out", max_length=None)
    assert (len(prepared.train), len(prepared.eval)) == (6, 1)
    assert prepared.train["prompt"][:] == train["prompt"][:]
    with pytest.raises(DataError, match="no split 'dev' in .*dict, but train, test"):
        prepare(section.model_copy(update={"eval_split": "dev"}), tokenizer, tmp_path / "out", max_length=None)
    train.save_to_disk(tmp_path / "single")
    single = prepare(DataSection(source=str(tmp_path / "single")), tokenizer, tmp_path / "out", max_length=None)
    assert single.train["chosen_ids"][:] == prepared.train["chosen_ids"][:]


@pytest.mark.parametrize("make", [lambda text: text, lambda text: [user(text)]], ids=["text", "messages"])
def test_a_share_of_the_prompts_is_held_out(tmp_path, tokenizer, make):
    as_answer = (lambda text: text) if make("") == "" else lambda text: [assistant(text)]
    rows = [
        {
            "prompt": make(f"prompt {number % 20}" + " " * (number // 20)),
            "chosen": as_answer(f"a{number}"),
            "rejected": as_answer("b"),
        }
        for number in range(60)
    ]
    rows[7]["chosen"] = None  # counted with the rows to train on

    def prepared(rows, **section):
        return prepare_rows(tmp_path, rows, tokenizer, eval_share=0.25, **section)

    data = prepared(rows)
    held_out = {pair_id.partition("-")[2] for pair_id in data.eval["pair_id"]}
    kept = {pair_id.partition("-")[2] for pair_id in data.train["pair_id"]}
    assert not held_out & kept and not {int(n) % 20 for n in held_out} & {int(n) % 20 for n in kept}
    assert len({int(n) % 20 for n in held_out}) == 5 and len(held_out) + len(kept) == 59
    assert refused(data) == {"missing_value": 1}
    again = prepared(rows)
    assert again.eval["pair_id"][:] == data.eval["pair_id"][:]
    named = [{**row, "pair_id": str(number)} for number, row in enumerate(rows)]
    other_order = prepared(named[::-1])
    assert sorted(other_order.eval["pair_id"], key=int) == sorted(held_out, key=int)
    assert set(prepared(named, eval_seed=1).eval["pair_id"]) != held_out
    few = prepared(rows, max_train_pairs=4, max_eval_pairs=2)
    assert (len(few.train), few.eval["pair_id"][:]) == (4, data.eval["pair_id"][:2])
    with pytest.raises(DataError, match="data.eval_share is 0.25, and .* has 1 usable prompt"):
        prepared([rows[0]])


def test_a_line_separator_inside_a_string_does_not_end_the_row(tmp_path, tokenizer):
    row = {**STANDARD_ROWS[0], "chosen": "one\u2028two\u0085three"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    prepared = prepare(DataSection(source=str(tmp_path / "rows.jsonl")), tokenizer, tmp_path / "out", max_length=None)
    assert prepared.train[0]["chosen"] == "one\u2028two\u0085three<eos>"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"source": "nowhere/rows.jsonl"}, "no such file or folder"),
        ({"eval_split": "test"}, "a file is one split"),
        ({"revision": "main"}, "data.revision is 'main'.* no hub data set"),
        ({"subset": "x"}, "data.subset is 'x'"),
        (
            {"columns": {"chosen": "best"}},
            "no column 'best' among prompt, chosen, rejected.*columns: {chosen: its_name}",
        ),
        ({"columns": {"prompt": "question"}}, "no column 'question' among prompt, chosen, rejected"),
    ],
)
def test_a_wrong_section_is_refused_with_what_is_there(tmp_path, tokenizer, section, message):
    with pytest.raises(DataError, match=message):
        source = {"source": str(write_jsonl(tmp_path / "rows.jsonl", STANDARD_ROWS)), **section}
        prepare(DataSection(**source), tokenizer, tmp_path / "out", max_length=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"chosen": "a"}\n{"chosen', "rows.jsonl, line 2: not valid JSON"),
        (b'{"chosen": "a"}\n\n[1]\n', "line 3: expected an object with columns, got list"),
        (b"\xff\xfe", "not readable as UTF-8"),
        (b"", "it is empty"),
        (b'{"question": "a", "chosen": "b", "rejected": "c"}', "no column 'prompt' among question, chosen, rejected"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path, tokenizer, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(DataSection(source=str(tmp_path / "rows.jsonl")), tokenizer, tmp_path / "out", max_length=None)


def test_a_repeated_pair_id_is_refused(tmp_path, tokenizer):
    rows = [{**STANDARD_ROWS[0], "pair_id": pair_id} for pair_id in ("7", "8", 7)]
    with pytest.raises(DataError, match="rows 0 and 2 .* same pair id '7'"):
        prepare_rows(tmp_path, rows, tokenizer)


def test_conversations_need_a_chat_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    with pytest.raises(DataError, match="no chat template.*instruction-tuned model"):
        prepare_rows(tmp_path, CONVERSATIONS, tokenizer)


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)],
    )
    with pytest.raises(DataError, match="ends every text with EOS"):
        prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)


@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_a_hub_set_out_of_reach_says_that_a_local_path_works(tmp_path, tokenizer, revision, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    section = DataSection(source="epsdpo-tests/no-such-set", revision=revision)
    with pytest.raises(DataError, match="no local path, and the hub did not give it.*HF_HUB_OFFLINE.*name their path"):
        prepare(section, tokenizer, tmp_path / "out", max_length=None)


def test_the_world_brings_gold_rewards_and_held_out_prompts(tmp_path, monkeypatch):
    """With the world's own language; only its minute of sampling from a model is replaced by two fixed answers."""
    from epsdpo.world.build import build_tokenizer, render, sample_instructions

    texts = [render(instruction) for instruction in sample_instructions(3, seed=0, split="train")]
    pairs = pd.DataFrame(
        {
            "pair_id": [f"train-{number}" for number in range(3)],
            "prompt": [[user(text)] for text in texts],
            "chosen": [[assistant("apple pear plum")]] * 3,
            "rejected": [[assistant("cat")]] * 3,
            "chosen_gold": [1.0, 0.5, 0.25],
            "rejected_gold": [0.0, 0.5, -0.25],
            "task": ["name"] * 3,
        }
    )
    prompts = pd.DataFrame(
        {
            "prompt_id": ["p0", "p1"],
            "prompt": [[user(text)] for text in texts[:2]],
            "instruction": texts[:2],
            "task": "x",
        }
    )
    monkeypatch.setattr("epsdpo.world.build.preference_pairs", lambda settings, split: pairs, raising=False)
    monkeypatch.setattr("epsdpo.world.build.evaluation_prompts", lambda settings: prompts, raising=False)
    prepared = prepare(DataSection(eval_split="eval", max_eval_pairs=2), build_tokenizer(), tmp_path, max_length=64)
    assert prepared.train["chosen_gold"][:] == [1.0, 0.5, 0.25]
    assert prepared.train["rejected_gold"][:] == [0.0, 0.5, -0.25]
    assert len(prepared.eval) == 2
    assert prepared.prompts["instruction"][:] == texts[:2]
    # The policy is asked with the very tokens it was trained behind.
    assert prepared.prompts["prompt_ids"][:] == prepared.train["prompt_ids"][:2]
    assert prepared.report["prompts"]["rows"] == 2
    with pytest.raises(DataError, match="no split 'test'; it has train, eval"):
        prepare(DataSection(eval_split="test"), build_tokenizer(), tmp_path, max_length=64)


# ---------------------------------------------------------------------------------------------------- prepared folder


def test_a_prepared_folder_is_read_back_as_it_was_returned(tmp_path, tokenizer):
    prepared = prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    again = load_prepared(tmp_path / "out")
    assert again.train.to_list() == prepared.train.to_list()
    assert again.report == prepared.report
    assert again.eval is None and again.prompts is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "train.parquet"]
    lengths = token_lengths(again)
    assert list(lengths.columns) == ["split", "part", "tokens"]
    chosen = lengths[(lengths["split"] == "train") & (lengths["part"] == "chosen")]["tokens"]
    assert chosen.tolist() == [len(ids) for ids in again.train["chosen_ids"]]


def test_preparing_again_leaves_nothing_of_the_data_before(tmp_path, tokenizer):
    rows = write_jsonl(tmp_path / "train.jsonl", STANDARD_ROWS)
    write_jsonl(tmp_path / "test.jsonl", STANDARD_ROWS)
    with_eval = DataSection(source=str(tmp_path), eval_split="test")
    assert len(prepare(with_eval, tokenizer, tmp_path / "out", max_length=None).eval) == 2
    assert prepare(DataSection(source=str(rows)), tokenizer, tmp_path / "out", max_length=None).eval is None
    assert not (tmp_path / "out" / "eval.parquet").exists()


def test_a_changed_file_is_noticed(tmp_path, tokenizer):
    prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    path = tmp_path / "out" / "train.parquet"
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    with pytest.raises(DataError, match="holds 1 rows, and report.json says 2"):
        load_prepared(tmp_path / "out")
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="train.parquet is not readable"):
        load_prepared(tmp_path / "out")


def test_killed_half_way_leaves_nothing_to_load(tmp_path, tokenizer):
    """A folder prepared before, prepared again by a process that is killed while it writes."""
    prepare_rows(tmp_path, STANDARD_ROWS, tokenizer)
    rows = STANDARD_ROWS * 50_000
    process = multiprocessing.get_context("fork").Process(target=prepare_rows, args=(tmp_path, rows, tokenizer))
    process.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "train.parquet.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "out" / "train.parquet.partial").exists()
    with pytest.raises(DataError, match="not prepared, or interrupted half-way"):
        load_prepared(tmp_path / "out")
