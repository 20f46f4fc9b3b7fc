"""The β record: what is written is read back, kills at any moment lose and repeat nothing, and damage is said."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from epsdpo.files import written_whole
from epsdpo.methods.record import (
    PAIR_SCHEMA,
    PAIRS_FILE,
    PAIRS_STREAM,
    STEPS_FILE,
    DamagedRecord,
    first_step,
    incompleteness,
    read_pairs,
    read_steps,
)
from epsdpo.methods.record_writer import BetaRecord, StepRecord


def step_pairs(step):
    return pd.DataFrame(
        {
            "step": step,
            "epoch": step / 10,
            "pair_id": [f"{step}-a", f"{step}-b"],
            "decision": [1, -1],
            "beta": [0.1, 0.2],
            "chosen_logps": [-1.0, -2.0],
            "rejected_logps": [-3.0, -5.0],
            "ref_chosen_logps": [-2.0, -2.5],
            "ref_rejected_logps": [-2.5, -2.5],
            "chosen_tokens": [3, 4],
            "rejected_tokens": [5, 6],
        }
    )


def write(directory, steps, record=None):
    record = record or BetaRecord(directory)
    if record._stream is None and not (directory / STEPS_FILE).exists():
        record.rewind(0)
    for step in steps:
        record.append({"step": step, "loss": step / 7}, step_pairs(step))
    return record


def recorded(directory):
    return read_steps(directory)["step"].tolist(), read_pairs(directory)["pair_id"].tolist()


def both(steps):
    return list(steps), [f"{step}-{name}" for step in steps for name in "ab"]


def test_rows_can_be_read_while_the_run_goes_on_and_after(tmp_path):
    record = write(tmp_path, range(1, 4))
    assert recorded(tmp_path) == both(range(1, 4))
    record.close()
    assert recorded(tmp_path) == both(range(1, 4))
    assert not (tmp_path / PAIRS_STREAM).exists()
    assert read_steps(tmp_path)["loss"].tolist() == [1 / 7, 2 / 7, 3 / 7]


def test_margins_are_derived_by_hand(tmp_path):
    write(tmp_path, [1]).close()
    pairs = read_pairs(tmp_path)
    assert pairs["policy_log_ratio"].tolist() == [2.0, 3.0]
    assert pairs["ref_log_ratio"].tolist() == [0.5, 0.0]
    assert pairs["log_ratio_margin"].tolist() == [1.5, 3.0]
    assert pairs["reward_margin"].tolist() == pytest.approx([0.15, 0.6])


def test_resumption_repeats_no_step(tmp_path):
    """Killed after step 5 (nothing closed), resumed from the checkpoint at step 3."""
    write(tmp_path, range(1, 6))
    record = BetaRecord(tmp_path)
    record.rewind(3)
    assert recorded(tmp_path) == both(range(1, 4))
    write(tmp_path, range(4, 8), record).close()
    assert recorded(tmp_path) == both(range(1, 8))


def test_new_training_starts_the_record_over(tmp_path):
    write(tmp_path, range(1, 4)).close()
    record = BetaRecord(tmp_path)
    record.rewind(0)
    assert recorded(tmp_path) == ([], [])
    write(tmp_path, [1], record).close()
    assert recorded(tmp_path) == both([1])


@pytest.mark.parametrize("lost_bytes", [1, 40, 200])
def test_rows_cut_off_by_a_kill_are_not_rows(tmp_path, lost_bytes):
    write(tmp_path, range(1, 4))
    for name in (STEPS_FILE, PAIRS_STREAM):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: -min(lost_bytes, 10) if name == STEPS_FILE else -lost_bytes])
    assert recorded(tmp_path) == both([1, 2])
    record = BetaRecord(tmp_path)
    record.rewind(2)
    write(tmp_path, [3], record).close()
    assert recorded(tmp_path) == both([1, 2, 3])


def test_kill_while_compacting_leaves_no_row_twice(tmp_path):
    """The Parquet file is in place and the stream not yet gone."""
    record = write(tmp_path, range(1, 4))
    shutil.copy(tmp_path / PAIRS_STREAM, tmp_path / "kept")
    record.close()
    shutil.move(tmp_path / "kept", tmp_path / PAIRS_STREAM)
    assert recorded(tmp_path) == both(range(1, 4))


def test_numbers_that_json_cannot_hold_are_refused(tmp_path):
    record = write(tmp_path, [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        record.append({"step": 2, "loss": float("nan")}, step_pairs(2))


def test_folder_without_a_record_is_named(tmp_path):
    for read in (read_steps, read_pairs):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} holds no β record"):
            read(tmp_path)


def test_parquet_has_the_documented_schema(tmp_path):
    write(tmp_path, [1]).close()
    assert pa.parquet.read_schema(tmp_path / PAIRS_FILE).equals(PAIR_SCHEMA)


def rewrite(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


STEP_DAMAGES = {
    "garbage": (lambda lines: lines.__setitem__(1, b"}\xff{\n"), "row 2, that of step 2, cannot be read"),
    "no-row": (lambda lines: lines.__setitem__(1, b"[2]\n"), "row 2, that of step 2, cannot be read"),
    "zeros": (lambda lines: lines.__setitem__(2, b"\0" * 80 + b"\n"), "row 3, that of step 3, cannot be read"),
    "lost-first": (lambda lines: lines.__delitem__(0), "row 1 is of step 2 instead of 1"),
    "lost": (lambda lines: lines.__delitem__(1), "row 2 is of step 3 instead of 2"),
    "twice": (lambda lines: lines.insert(1, lines[0]), "row 2 is of step 1 instead of 2"),
}
ENDED_DAMAGES = {
    "lost-last": (lambda lines: lines.__delitem__(-1), "holds 3 of the 4 rows"),
    "torn": (lambda lines: lines.__setitem__(-1, lines[-1][:-3]), "holds 3 of the 4 rows"),
    "emptied": (lambda lines: lines.clear(), "holds 0 of the 4 rows"),
    "more": (lambda lines: lines.append(b'{"step": 5}\n'), "row 5 was added"),
    "another-number": (
        lambda lines: lines.__setitem__(1, lines[1].replace(b"0.2857", b"0.2957")),
        "its first 4 rows are not those",
    ),
}


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("damage", [*STEP_DAMAGES, *ENDED_DAMAGES])
def test_damaged_steps_are_refused_by_row(tmp_path, damage, ended):
    """What a kill may have done, the loss of the last rows, is damage once the run has ended."""
    record = write(tmp_path, range(1, 5))
    record.announce(4)
    if ended:
        record.finish()
    change, problem = {**STEP_DAMAGES, **ENDED_DAMAGES}[damage]
    rewrite(tmp_path / STEPS_FILE, change)
    if damage in ENDED_DAMAGES and not ended:
        read_steps(tmp_path)
        return
    with pytest.raises(DamagedRecord, match=rf"{STEPS_FILE}: .*{problem}.*restore the file from a copy"):
        read_steps(tmp_path)


@pytest.mark.parametrize("place", [0.05, 0.2, 0.3])
def test_flipped_bits_of_pairs_are_noticed(tmp_path, place):
    write(tmp_path, range(1, 100)).finish()
    content = bytearray((tmp_path / PAIRS_FILE).read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / PAIRS_FILE).write_bytes(content)
    with pytest.raises(DamagedRecord, match=rf"{PAIRS_FILE}: cannot be read.*restore the file"):
        read_pairs(tmp_path)


@pytest.mark.parametrize("kept", [0, 100])
def test_pairs_that_are_no_parquet_are_refused(tmp_path, kept):
    write(tmp_path, [1]).finish()
    content = (tmp_path / PAIRS_FILE).read_bytes()
    (tmp_path / PAIRS_FILE).write_bytes(content[:kept])
    with pytest.raises(DamagedRecord, match=f"{PAIRS_FILE}: cannot be read"):
        read_pairs(tmp_path)


def decided(record, steps):
    for step in steps:
        record.append({"step": step, "relaxed": 0.5, "pairs_seen": 2 * step}, step_pairs(step))


@pytest.mark.parametrize("name", [PAIRS_STREAM, PAIRS_FILE])
def test_pairs_that_are_not_those_of_the_steps_are_refused(tmp_path, name):
    record = BetaRecord(tmp_path / "run")
    record.rewind(0)
    record.announce(4)
    decided(record, range(1, 4))
    assert len(read_pairs(tmp_path / "run")) == 6
    if name == PAIRS_FILE:
        record.finish()
    other = BetaRecord(tmp_path / "other")
    other.rewind(0)
    for steps, problem in (([1, 2], "0 pairs of step 3, where 2"), ([1, 2, 2, 3], "4 pairs of step 2, where 2")):
        other.rewind(0)
        decided(other, steps)
        if name == PAIRS_FILE:
            other.close()
        shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
        with pytest.raises(DamagedRecord, match=rf"{PAIRS_FILE}: holds {problem} were written"):
            read_pairs(tmp_path / "run")


def test_what_is_written_whole_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, flush = [], os.fsync

    def watched(descriptor):
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, (tmp_path / "file").exists()))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with written_whole(tmp_path / "file") as partial:
        partial.write_text("content")
    assert flushed == [("file.partial", False), (tmp_path.name, True)]


def test_rows_have_the_same_digest_wherever_they_lie(tmp_path):
    """Told once from what was written, once from what is read back out of both files."""
    record = write(tmp_path, range(1, 6))
    told = record.rows()
    assert BetaRecord(tmp_path).missing(told) is None
    record.close()
    assert BetaRecord(tmp_path).missing(told) is None
    resumed = BetaRecord(tmp_path)
    resumed.rewind(3)
    write(tmp_path, [4, 5], resumed)
    assert resumed.rows() == told and BetaRecord(tmp_path).missing(told) is None
    resumed.rewind(3)
    assert "holds 3 of the 5 rows" in resumed.missing(told)


def test_a_record_that_begins_later_says_so(tmp_path):
    for steps_per_row, step, first in ((1, 3, 4), (10, 25, 30)):
        folder = tmp_path / str(steps_per_row)
        record = StepRecord(folder, steps_per_row)
        record.rewind(step)
        record.announce(40)
        record.append({"step": first})
        assert read_steps(folder)["step"].tolist() == [first]
        assert first_step(folder) == first and f"begins at step {first}" in incompleteness(folder)
    record = StepRecord(tmp_path / "whole", 10)
    record.rewind(0)
    record.announce(40)
    record.append({"step": 10})
    record.rewind(15)
    record.announce(40)
    assert first_step(tmp_path / "whole") == 1 and incompleteness(tmp_path / "whole") is None
