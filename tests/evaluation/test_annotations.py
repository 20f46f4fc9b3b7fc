"""Files of judgements: both formats read, what is wrong refused by row and key, and AlpacaEval's format written."""

import gzip
import json

import numpy as np
import pytest

from epsdpo.evaluation.scores.annotations import InputError, read_annotations, write_annotations


def official_row(number, preference, **changes):
    return {
        "instruction": f"prompt {number}",
        "output_1": "refer",
        "generator_1": "reference",
        "output_2": "é" * number,
        "generator_2": "model",
        "annotator": "judge",
        "preference": preference,
        **changes,
    }


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_official_format_is_read(tmp_path):
    rows = [official_row(3, 1.25), official_row(7, 2), official_row(1, None), official_row(0, 0)]
    annotations = read_annotations(write_json(tmp_path / "annotations.json", rows))
    assert (annotations.model, annotations.reference, annotations.annotator) == ("model", "reference", "judge")
    assert annotations.prompts["instruction"].tolist() == ["prompt 3", "prompt 7", "prompt 1", "prompt 0"]
    assert annotations.prompts["model_length"].tolist() == [3, 7, 1, 0]
    assert annotations.prompts["reference_length"].tolist() == [5] * 4
    np.testing.assert_array_equal(annotations.prompts["preference"], [1.25, 2.0, np.nan, 1.5])


def test_reduced_format_is_read(tmp_path):
    rows = [{"row": 0, "instruction": "prompt", "len_1": 12, "len_2": 34, "preference": 1.0, "top_logprobs": None}]
    annotations = read_annotations(write_json(tmp_path / "annotations.json", rows))
    assert annotations.prompts.to_dict("records") == [
        {"instruction": "prompt", "preference": 1.0, "model_length": 34.0, "reference_length": 12.0}
    ]
    assert annotations.model is None


def test_gzip_is_told_by_its_content(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_bytes(gzip.compress(json.dumps([official_row(1, 1.5)]).encode()))
    assert len(read_annotations(path).prompts) == 1


@pytest.mark.parametrize("failed", [None, float("nan"), -1, -1.0])
def test_failed_judgements_are_kept_as_missing(tmp_path, failed):
    rows = [official_row(1, failed, output_2=None), official_row(2, 1.5)]
    prompts = read_annotations(write_json(tmp_path / "annotations.json", rows)).prompts
    np.testing.assert_array_equal(prompts["preference"], [np.nan, 1.5])
    np.testing.assert_array_equal(prompts["model_length"], [np.nan, 2.0])


def test_a_row_without_the_key_preference_is_a_failed_judgement(tmp_path):
    row = official_row(1, 1.5)
    del row["preference"]
    prompts = read_annotations(write_json(tmp_path / "annotations.json", [row, official_row(2, 2.0)])).prompts
    assert prompts["preference"].isna().tolist() == [True, False]


def test_what_is_left_of_a_judge_that_thinks_first_is_a_failed_judgement(tmp_path, caplog):
    """Whether the file keeps the log-probabilities as this kit does, as AlpacaEval's package does, or in the row."""
    thought, answer = [["<think>", 0.0], ["m", -16.0]], [["M", -0.01], ["m", -5.0]]
    official = {"logprobs": {"content": [{"token": "<think>", "top_logprobs": [
        {"token": token, "logprob": logprob, "bytes": None} for token, logprob in thought
    ]}]}}  # fmt: skip
    rows = [
        official_row(1, 1.2, raw_completion=[{"top_logprobs": answer}]),
        official_row(2, 1.0, raw_completion=[{"top_logprobs": answer}, {"top_logprobs": thought}]),
        official_row(3, 1.0, raw_completion=official),
        official_row(4, 1.0, top_logprobs=thought),
        official_row(5, 1.9, raw_completion="<think>"),
    ]
    prompts = read_annotations(write_json(tmp_path / "annotations.json", rows)).prompts
    np.testing.assert_array_equal(prompts["preference"], [1.2, np.nan, np.nan, np.nan, 1.9])
    assert "3 of 5 judgements count as failed" in caplog.text and "mode: text" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": 2.5}, "row 1: `preference` is 2.5, outside"),
        ({"preference": 0.5}, "row 1: `preference` is 0.5, outside"),
        ({"preference": -2}, "row 1: `preference` is -2, outside"),
        ({"preference": float("inf")}, "row 1: `preference` is inf, outside"),
        ({"preference": "2"}, 'row 1: `preference` is "2", not a number'),
        ({"preference": True}, "row 1: `preference` is true, not a number"),
        ({"instruction": None}, "row 1: `instruction` is null, not a text"),
        ({"instruction": "prompt 0"}, 'row 1: `instruction` "prompt 0" repeats that of row 0'),
        ({"output_2": None}, "row 1: `output_2` is null"),
        ({"output_1": ["text"]}, r"row 1: `output_1` is \[\"text\"\]"),
        ({"output_1": None, "len_1": -4}, "row 1: `len_1` is -4"),
        ({"generator_2": "another"}, 'row 1: `generator_2` is "another", in row 0 it is "model"'),
        ({"generator_1": None}, 'row 1: `generator_1` is null, in row 0 it is "reference"'),
        ({"annotator": "another"}, 'row 1: `annotator` is "another", in row 0 it is "judge"'),
        ({"annotator": 4}, "row 1: `annotator` is 4, not a text"),
    ],
)
def test_what_is_wrong_is_refused_by_file_row_and_key(tmp_path, changes, message):
    path = write_json(tmp_path / "annotations.json", [official_row(0, 1.5), {**official_row(1, 1.5), **changes}])
    with pytest.raises(InputError, match=message) as refusal:
        read_annotations(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b'[{"instruction": "a"', "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"instruction": "a"}', "not a list of judgements"),
        (b"[]", "not a list of judgements"),
        (b"[1]", "row 0 is 1, not an object"),
        (gzip.compress(b"[]" * 9, mtime=0)[:-9], "gzip stream is cut"),
        (b"\x1f\x8b\x08\x00broken", "gzip stream is cut"),
        (gzip.compress(b"[]", mtime=0)[:-8] + b"01234567", "cannot be read"),
    ],
)
def test_files_that_are_not_judgements_are_refused(tmp_path, content, message):
    path = tmp_path / "annotations.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_annotations(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="annotations.json: cannot be read: No such file"):
        read_annotations(tmp_path / "annotations.json")


@pytest.mark.parametrize("name", ["annotations.json", "annotations.json.gz"])
def test_what_is_written_reads_back(tmp_path, name):
    rows = [
        official_row(3, 1.25, raw_completion="m", reward_1=0.5),
        official_row(4, None),
        official_row(5, float("nan")),
        official_row(6, 0),
    ]
    write_annotations(tmp_path / name, rows)
    content = (tmp_path / name).read_bytes()
    text = gzip.decompress(content) if name.endswith(".gz") else content
    stored = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not strict JSON"))
    assert [row["preference"] for row in stored] == [1.25, None, None, 1.5]
    assert stored[0] == rows[0]
    prompts = read_annotations(tmp_path / name).prompts
    assert prompts["model_length"].tolist() == [3, 4, 5, 6]
    write_annotations(tmp_path / f"again_{name}", rows)
    assert (tmp_path / f"again_{name}").read_bytes() == content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "prompt"}, "row 0 to be written has no `output_1`"),
        (official_row(1, 7.0), "row 0: `preference` is 7, outside"),
    ],
)
def test_rows_that_would_be_refused_are_not_written(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        write_annotations(tmp_path / "annotations.json", [row])
    assert list(tmp_path.iterdir()) == []
