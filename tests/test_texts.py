"""Half of an emoji, wherever text of others comes in: replaced or refused before it is kept, and nothing breaks."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.chat_judging import comparisons, judge_all, lines
from kit.chat_server import ChatServer, completion
from kit.official import OFFICIAL
from transformers import AutoTokenizer

from epsdpo.__main__ import main
from epsdpo.data.prepared import prepare
from epsdpo.data.prompts import prompts_of
from epsdpo.data.sources import DataError, read_file
from epsdpo.evaluation.benchmarks.results import read_results, write_results
from epsdpo.evaluation.evaluate import write_json
from epsdpo.evaluation.judged_before import read_published
from epsdpo.evaluation.judges.ask import JUDGEMENTS
from epsdpo.evaluation.judges.counts import annotations
from epsdpo.evaluation.scores.annotations import read_annotations, write_annotations
from epsdpo.experiment import CalibrateSection, ConfigError, DataSection, PromptsSection, check_experiment
from epsdpo.experiment.sweep import parse_overrides
from epsdpo.files import is_writable, texts_in, writable
from epsdpo.models.kept import Kept, append_lines
from epsdpo.paper.claims.settings import read_claims
from epsdpo.runs.manifest import read_stage_file, write_stage_file

HALF = "\ud83d"
WHOLE = "\ufffd"


def test_halves_are_replaced_and_pairs_joined():
    assert writable(f"a{HALF}b") == f"a{WHOLE}b" and writable(HALF + HALF) == WHOLE * 2
    assert writable("\ud83d\ude00") == "😀" and writable("\ude00\ud83d") == WHOLE * 2
    assert writable("\udcff") == WHOLE  # a byte of a command line that is no UTF-8
    nested = {HALF: [f"{HALF}x", 1, None, {"a": ("b", 2.5)}]}
    assert writable(nested) == {WHOLE: [f"{WHOLE}x", 1, None, {"a": ["b", 2.5]}]}
    assert [at for at, text in texts_in(nested) if not is_writable(text)] == [(HALF,), (HALF, 0)]


@given(st.text(st.characters(), max_size=20))
def test_any_text_is_writable_then_and_others_stay_as_they_are(text):
    assert is_writable(writable(text)) and len(writable(text)) <= len(text)
    assert writable(writable(text)) == writable(text)
    if is_writable(text):
        assert writable(text) is text


# ------------------------------------------------------------------------------------------------------------ judges


def odd(body, before):
    """A judge whose tokens and whose name are cut in the middle of an emoji."""
    top = [("M", -0.1), (HALF, -3.0), ("m", -4.0)]
    return completion(HALF, top, model=f"judge-{HALF}")


def test_what_a_judge_says_is_kept_so_that_annotations_can_be_written(tmp_path):
    items = comparisons(3)
    with ChatServer(odd) as server:
        first = judge_all(items, server, tmp_path)
        again = judge_all(items, server, tmp_path)
        assert len(server.bodies) == 3
    assert [item.records for item in first] == [item.records for item in again]
    assert lines(tmp_path)[0]["served_model"] == f"judge-{WHOLE}"
    assert lines(tmp_path)[0]["answer"]["top_logprobs"][1] == [WHOLE, -3.0]
    for judgements in (first, again):
        write_annotations(tmp_path / "annotations.json", annotations(items, judgements, "judge", "model"))
        assert read_annotations(tmp_path / "annotations.json").prompts["preference"].notna().all()


def test_a_store_that_holds_halves_is_usable_again(tmp_path):
    """As an older version wrote them: in bytes that are no UTF-8, and as an escape."""
    items = comparisons(2)
    with ChatServer(odd) as server:
        judge_all(items, server, tmp_path)
        records = [json.dumps(record | {"served_model": HALF}, ensure_ascii=number == 0) for number, record in
                   enumerate(lines(tmp_path))]  # fmt: skip
        (tmp_path / JUDGEMENTS).write_bytes("".join(line + "\n" for line in records).encode("utf-8", "surrogatepass"))
        judgements = judge_all(items, server, tmp_path)
        assert len(server.bodies) == 2
    assert {record["served_model"] for item in judgements for record in item.records.values()} == {WHOLE}
    write_annotations(tmp_path / "annotations.json", annotations(items, judgements, "judge", "model"))


def test_failures_are_logged_whatever_they_say(tmp_path):
    append_lines(tmp_path / "failures.jsonl", [{"key": "a", "detail": HALF}])
    with Kept(tmp_path / JUDGEMENTS, dict) as kept:
        kept.add([{"key": HALF, "preference": 1.5}])
        assert kept[WHOLE] == {"key": WHOLE, "preference": 1.5}
    assert (tmp_path / "failures.jsonl").read_text(encoding="utf-8").count(WHOLE) == 1


# ------------------------------------------------------------------------------------------- files that others wrote


def test_judgements_and_outputs_of_others_are_read_repaired(tmp_path):
    """Outputs keep their number of characters, by which they are held to the ones that were judged."""
    row = {"instruction": f"q{HALF}", "output_1": HALF * 2, "output_2": "x", "preference": 2.0}
    rows = [row | {"generator_1": "a", "generator_2": HALF, "annotator": "judge"}]
    (tmp_path / "annotations.json").write_text(json.dumps(rows))
    read = read_annotations(tmp_path / "annotations.json")
    assert read.model == WHOLE and read.prompts["reference_length"].tolist() == [2.0]
    section = CalibrateSection(annotations=str(tmp_path / "annotations.json"))
    (comparison,) = read_published(section, seed=0).comparisons
    assert (comparison.instruction, comparison.reference_output) == (f"q{WHOLE}", WHOLE * 2)
    write_annotations(tmp_path / "again.json", rows)
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))[0]["instruction"] == f"q{WHOLE}"


def test_what_prompts_bring_along_can_be_written(tmp_path):
    rows = [{"instruction": f"q {n}", "output": HALF, "task": HALF, "prompt_id": f"{n}{HALF}"} for n in range(2)]
    table = prompts_of(rows, PromptsSection(source="file")).table
    assert table["given_response"].tolist() == [WHOLE] * 2 and table["prompt_id"].tolist() == [f"0{WHOLE}", f"1{WHOLE}"]
    table.drop(columns="messages").to_parquet(tmp_path / "prompts.parquet")


def test_pairs_that_cannot_be_written_are_refused_and_counted(tmp_path):
    good = {"prompt": "what is it ", "chosen": "a cat", "rejected": "a dog", "pair_id": "good"}
    rows = [good, good | {"pair_id": HALF}, good | {"chosen": HALF, "pair_id": "text"}]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    section = DataSection(source=str(tmp_path / "pairs.json"))
    report = prepare(section, tokenizer, tmp_path / "prepared", max_length=64).report
    assert report["splits"]["train"]["refused"]["wrong_type"]["rows"] == 2
    # A message may hold more than role and content, and the chat template may write it.
    said = [{"role": "user", "content": "q", "name": HALF}]
    left_out = prompts_of([{"messages": said}, {"instruction": "q"}], PromptsSection(source="file")).report["left_out"]
    assert left_out["wrong_type"]["rows"] == 1


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_is_no_utf8_is_refused_by_name(tmp_path, suffix):
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table, path = pa.table({"instruction": broken}), tmp_path / f"prompts.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=f"prompts.{suffix}: not readable as {suffix}: .*UTF8"):
        read_file(path, ["instruction"])


# ---------------------------------------------------------------------------------------- names, titles and manifests


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"title": f"run {HALF}"}, "title"),
        ({"title": "two halves \ud83d\ude00"}, "title"),
        ({"name": HALF}, "name"),
        ({"data": {"columns": {"prompt": HALF}}}, "data.columns.prompt"),
        ({"train": {"run_name": HALF}}, "train.run_name"),
        ({"train": {"lr_scheduler_kwargs": {HALF: 1}}}, "train.lr_scheduler_kwargs"),
        ({"evaluate": {"judge": {"kind": "chat", "model": HALF, "base_url": "http://x/v1"}}}, "evaluate.judge.model"),
        ({"title": "a\0b"}, "title"),
    ],
)
def test_names_and_titles_are_refused_before_anything_runs(changes, key):
    values = {"name": "run", "method": "dpo", "train": {"beta": 0.1}} | changes
    with pytest.raises(ConfigError, match=f"run.yaml: {key}.*(half a character|zero byte)"):
        check_experiment(values, where="run.yaml")


def test_overrides_and_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="--set: title is .* half a character"):
        parse_overrides(['title="\\ud83d"'])
    assert main(["status", f"{tmp_path}/\udcff"]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_value_that_holds_itself_is_refused(tmp_path):
    values = {"name": "run", "method": "dpo", "train": {}}
    values["train"]["x"] = values["train"]
    with pytest.raises(ConfigError, match="train is nested more than 20 deep"):
        check_experiment(values, where="run.yaml")


def test_claims_are_refused(tmp_path):
    (tmp_path / "claims.yaml").write_text('claims:\n- {name: "\\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"claims.0.name is .* half a character"):
        read_claims(tmp_path / "claims.yaml")


def test_summaries_manifests_and_results_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["epsdpo", "\udcff"])
    write_json(tmp_path / "summary.json", {HALF: [HALF, np.nan]})
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == {WHOLE: [WHOLE, None]}
    write_stage_file(tmp_path, stage="train", parts={}, started=pd.Timestamp(0), error=HALF)
    assert read_stage_file(tmp_path)["command"] == ["epsdpo", WHOLE] and read_stage_file(tmp_path)["error"] == WHOLE
    write_results(tmp_path, {"policy": [{"label": HALF}]})
    assert read_results(tmp_path)["policy"] == [{"label": WHOLE}]
