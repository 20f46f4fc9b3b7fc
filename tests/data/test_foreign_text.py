"""Texts as other editors and tools write them: UTF-16, byte-order marks, line separators inside of strings."""

import gzip
import json

import pytest

from epsdpo.data.sources import DataError, read_file
from epsdpo.evaluation.judges.template import DEFAULT_TEMPLATE, load_template
from epsdpo.evaluation.scores.annotations import read_annotations
from epsdpo.evaluation.scores.length_control_data import read_gamed
from epsdpo.experiment import load_experiment
from epsdpo.files import text_of
from epsdpo.models.start import read_chat_template
from epsdpo.trajectory.trl_logs import read_log

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
ROWS = [{"prompt": "ä\u2028b", "chosen": "c\x85d", "rejected": "e"}, {"prompt": "f", "chosen": "g", "rejected": "h"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)


@pytest.fixture(params=ENCODINGS)
def write(request, tmp_path):
    def write_file(name, text):
        (tmp_path / name).write_bytes(text.encode(request.param))
        return tmp_path / name

    return write_file


def test_every_text_of_a_user_is_read_in_any_encoding(write, tmp_path):
    config = write("run.yaml", "method: dpo\ntitle: größer\ntrain: {beta: 0.1}\n")
    assert load_experiment(config).title == "größer"
    for name, text in (("rows.jsonl", LINES), ("rows.json", json.dumps(ROWS, ensure_ascii=False))):
        assert read_file(write(name, text), ["prompt", "chosen", "rejected"]).rows == ROWS
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_file(packed, ["prompt", "chosen", "rejected"]).rows == ROWS
    annotation = {"instruction": "ü\u2028", "output_1": "a", "output_2": "b", "preference": 1.5}
    annotations = read_annotations(write("annotations.json", json.dumps([annotation], ensure_ascii=False)))
    assert annotations.prompts["instruction"].tolist() == ["ü\u2028"]
    assert read_chat_template(str(write("t.jinja", "{{ 'ß' }}\r\n{{ x }}"))) == "{{ 'ß' }}\n{{ x }}"
    assert load_template(write("judge.txt", DEFAULT_TEMPLATE)) == load_template(None)
    gamed = read_gamed(
        write("gamed.csv", "preference,std_delta_len,instruction_difficulty\n0.5,0.1,0.2\n0.4,0.2,0.1\n")
    )
    assert gamed is not None
    notes = [{"step": 1, "beta": 0.1, "note": "a\u2028b"}, {"step": 2, "beta": 0.09, "note": "c"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in notes)
    for log in (write("log.csv", "step,beta\n1,0.1\n2,0.09\n"), write("log.jsonl", lines)):
        assert read_log(log).steps["beta_before"].tolist() == [0.1, 0.09]


def test_an_editors_line_ends_are_one_and_empty_files_are_named(tmp_path):
    assert text_of(b"a\r\nb\rc\n") == "a\nb\nc\n"
    for content, problem in ((b"", "it is empty"), (b"\xff\xfea", "truncated data"), (b"\xe9t\xe9", "invalid")):
        (tmp_path / "rows.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=f"rows.jsonl: not readable as UTF-8 or UTF-16 text: .*{problem}"):
            read_file(tmp_path / "rows.jsonl", ["prompt"])
