"""Prompts from each kind of source: what becomes of a row, what is left out and counted, what is refused."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from epsdpo.data.prompts import read_prompts
from epsdpo.data.sources import DataError
from epsdpo.experiment import PromptsSection

HH_ROWS = Path(__file__).parents[1] / "data" / "hh_rows.jsonl"


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path, **settings):
    return read_prompts(PromptsSection(source=str(path), **settings), data_dir=Path("unused"))


def test_alpaca_evals_format(tmp_path):
    """One JSON array, with the baseline's output beside each instruction."""
    rows = [
        {"instruction": "Who wrote Emma?\n", "dataset": "koala", "output": "Jane Austen.", "generator": "gpt"},
        {"instruction": "Zähle bis 3 🙂", "dataset": "oasst", "output": "1 2 3", "generator": "gpt"},
    ]
    with gzip.open(tmp_path / "alpaca_eval.json.gz", "wt", encoding="utf-8") as file:
        json.dump(rows, file)
    prompts = read(tmp_path / "alpaca_eval.json.gz")
    # The instruction is kept to the last character: published judgements are joined by it.
    assert prompts.table.to_dict("records") == [
        {
            "prompt_id": f"prompt-{number}",
            "instruction": row["instruction"],
            "messages": [{"role": "user", "content": row["instruction"]}],
            "task": row["dataset"],
            "given_response": row["output"],
        }
        for number, row in enumerate(rows)
    ]
    assert (prompts.report["rows_read"], prompts.report["rows_kept"], prompts.report["duplicates"]) == (2, 2, 0)


def test_messages_and_conversations_of_pairs(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answer = {"role": "assistant", "content": "Hi"}
    rows = [{"prompt_id": 7, "messages": turns}, {"prompt_id": "b", "chosen": [*turns, answer], "rejected": []}]
    table = read(write(tmp_path / "prompts.jsonl", rows)).table
    assert table["prompt_id"].tolist() == ["7", "b"]
    assert table["messages"].tolist() == [turns, turns]
    assert table["given_response"].isna().tolist() == [True, False] and table["given_response"][1] == "Hi"
    assert table["instruction"].tolist() == ["System: Be brief.\n\nUser: Hello"] * 2


def test_hh_prompts_are_all_turns_but_the_last():
    """Real rows, some of them odd."""
    rows = [json.loads(line)["chosen"] for line in HH_ROWS.read_text(encoding="utf-8").splitlines()]
    prompts = read(HH_ROWS)
    left_out = {number for entry in prompts.report["left_out"].values() for number in entry["examples"]}
    kept = [row for number, row in enumerate(rows) if number not in left_out]
    assert len(kept) == len(prompts.table) == prompts.report["rows_kept"] >= 10
    for text, prompt in zip(kept, prompts.table.itertuples(), strict=True):
        question, _, answer = text.rpartition("\n\nAssistant:")
        assert prompt.given_response == answer.strip()
        assert prompt.messages[-1]["role"] == "user"
        # The same words in the same order, without headers.
        words = " ".join(message["content"] for message in prompt.messages).split()
        assert words == question.replace("\n\nHuman:", " ").replace("\n\nAssistant:", " ").split()


def test_single_turn_leaves_out_longer_dialogues():
    everything, single = read(HH_ROWS), read(HH_ROWS, single_turn=True)
    expected = [prompt for prompt in everything.table["messages"] if len(prompt) == 1]
    assert single.table["messages"].tolist() == expected and 0 < len(expected) < len(everything.table)
    assert single.report["left_out"]["several_turns"]["rows"] == len(everything.table) - len(expected)


def test_what_is_left_out_is_counted_with_its_reason(tmp_path, caplog):
    rows = [
        {"instruction": "fine"},
        {"output": "an answer to nothing"},
        {"instruction": 3},
        {"instruction": " \n"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"chosen": "no header"},
        {"chosen": "\n\nHuman: unanswered"},
        {"chosen": "\n\nHuman: half a surrogate \ud800\n\nAssistant: b"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read(tmp_path / "prompts.jsonl")
    assert {reason: entry["examples"] for reason, entry in prompts.report["left_out"].items()} == {
        "no_prompt": [1],
        "wrong_type": [2, 7],
        "empty_prompt": [3],
        "no_user_turn": [4],
        "not_a_transcript": [5],
        "no_assistant_turn": [6],
    }
    assert prompts.table["instruction"].tolist() == ["fine"]
    assert "2 rows left out as wrong_type, first [2, 7]" in caplog.text


def test_duplicates_are_kept_and_reported(tmp_path, caplog):
    rows = [{"instruction": text} for text in ("a", "b", "a", "a")]
    prompts = read(write(tmp_path / "prompts.jsonl", rows))
    assert len(prompts.table) == 4 and prompts.report["duplicates"] == 2
    assert "2 prompts repeat an earlier one" in caplog.text


def test_max_prompts_counts_usable_ones(tmp_path):
    rows = [{"instruction": ""}, {"instruction": "a"}, {"instruction": "b"}, {"instruction": "c"}]
    table = read(write(tmp_path / "prompts.jsonl", rows), max_prompts=2).table
    assert table["instruction"].tolist() == ["a", "b"]
    assert table["prompt_id"].tolist() == ["prompt-1", "prompt-2"]  # the row, not the rank


def test_files_of_a_folder_in_the_order_given(tmp_path):
    write(tmp_path / "a.jsonl", [{"instruction": "a"}])
    pd.DataFrame({"prompt": ["b"]}).to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path, files=["b.parquet", "a.jsonl"]).table["instruction"].tolist() == ["b", "a"]


def test_the_worlds_prompts_come_from_the_prepared_data(tmp_path):
    frame = pd.DataFrame({"prompt_id": ["p"], "instruction": ["count up from 1 to 3"], "task": ["count_up"]})
    frame.to_parquet(tmp_path / "prompts.parquet")
    prompts = read_prompts(PromptsSection(), tmp_path)
    assert prompts.table["messages"].tolist() == [[{"role": "user", "content": "count up from 1 to 3"}]]
    assert prompts.table["task"].tolist() == ["count_up"]
    with pytest.raises(FileNotFoundError, match="run the prepare stage"):
        read_prompts(PromptsSection(), tmp_path / "elsewhere")


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    path = write(
        tmp_path / "prompts.jsonl", [{"instruction": "a", "prompt_id": 1}, {"instruction": "b", "prompt_id": 1}]
    )
    with pytest.raises(DataError, match="prompt_id '1' occurs twice"):
        read(path)
    with pytest.raises(DataError, match="files is set, but source .* is a file"):
        read(path, files=["a.jsonl"])
    with pytest.raises(DataError, match="holds no 'c.jsonl'"):
        read(tmp_path, files=["prompts.jsonl", "c.jsonl"])
    with pytest.raises(DataError, match=r"'nobody/nothing' is no file .*say in prompts.files"):
        read("nobody/nothing")
    with pytest.raises(DataError, match="the hub did not give x.json: .* offline"):
        read("nobody/nothing", files=["x.json"])
    with pytest.raises(DataError, match=r"no prompt that can be used. empty_prompt \(1 rows\)"):
        read(write(tmp_path / "blank.jsonl", [{"instruction": " "}]))
