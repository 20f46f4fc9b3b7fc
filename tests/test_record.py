"""The β record: what is written is read back, and kills at any moment lose and repeat nothing."""

import shutil

import pandas as pd
import pyarrow as pa
import pytest

from epsdpo.record import PAIR_SCHEMA, PAIRS_FILE, PAIRS_STREAM, STEPS_FILE, BetaRecord, read_pairs, read_steps


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
