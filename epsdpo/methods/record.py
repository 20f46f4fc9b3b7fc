"""The β record of a run, what every optimiser step and every pair did: its files, and how they are read.

    steps.jsonl     one line per optimiser step
    pairs.parquet   one row per optimiser step and pair; while training runs, the newest rows are in pairs.arrow
    progress.json   how many steps there will be, with which the record begins, and how many rows a finished one has; in
                    which arithmetic pairs are decided

A run may be killed at any time, and its record read at any time: what is read is whole rows, as they were written, of
steps that follow one another, or it is refused.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from epsdpo.methods.row_digests import LineDigest

logger = logging.getLogger(__name__)

STEPS_FILE, PAIRS_FILE, PAIRS_STREAM = "steps.jsonl", "pairs.parquet", "pairs.arrow"
PROGRESS_FILE = "progress.json"
RECORD_FILES = (STEPS_FILE, PAIRS_FILE, PAIRS_STREAM, PROGRESS_FILE)

PAIR_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimiser step, from 1
        ("epoch", pa.float64()),
        ("pair_id", pa.string()),
        ("decision", pa.int8()),  # +1: β⁻, KL penalty relaxed; 0: tie; -1: β⁺, tightened
        ("beta", pa.float64()),  # the pair's β̃ in its loss; missing where it was left out of the loss (β-DPO)
        ("chosen_logps", pa.float64()),  # nats, summed over completion tokens
        ("rejected_logps", pa.float64()),
        ("ref_chosen_logps", pa.float64()),
        ("ref_rejected_logps", pa.float64()),
        ("policy_log_ratio", pa.float64()),  # chosen - rejected
        ("ref_log_ratio", pa.float64()),
        ("log_ratio_margin", pa.float64()),  # policy - reference: z - γ
        ("reward_margin", pa.float64()),  # β̃ (z - γ), the implicit reward margin
        ("chosen_tokens", pa.int64()),
        ("rejected_tokens", pa.int64()),
    ]
)


# Missing where a method does not have them: decisions and pairs belong to the methods that compare with a reference.
STEP_COLUMNS = (
    "step",  # optimiser step, from 1
    "epoch",
    "beta_before",
    "beta_after",
    "relaxed",  # fractions of the step's pairs that chose β⁻, β, β⁺
    "tied",
    "tightened",
    "mean_step",  # relaxed - tightened
    "loss",
    "reward_margin",  # with each pair's β̃
    "log_ratio_margin",  # nats, without β
    "chosen_log_ratio",  # log π - log π_ref of the chosen responses, nats; older records have it in their pairs alone
    "rejected_log_ratio",
    "reward_accuracy",  # like the reward margin, of the pairs that are in the loss
    "pairs_seen",  # since the run began
    "seconds",  # of this step
)

MAY_BE_MISSING = (
    *("relaxed", "tied", "tightened", "mean_step", "reward_margin", "log_ratio_margin"),
    *("chosen_log_ratio", "rejected_log_ratio", "reward_accuracy"),
)


class DamagedRecord(ValueError):
    """A record that is not what was written. The message names the file, the row where there is one, and the remedy."""

    def __init__(self, path: Path, problem: str):
        super().__init__(
            f"{path}: {problem}. A run that has not ended goes back, when it is continued, to its last checkpoint "
            "whose rows are whole. Of one that has, restore the file from a copy, or train it again in another folder"
        )


def read_steps(directory: str | Path) -> pd.DataFrame:
    """One row per optimiser step of the run in `directory`, in order; works while it is still training.

    Columns: `STEP_COLUMNS`.

    Raises:
        FileNotFoundError: if no run was recorded there.
        DamagedRecord: if a line is no row, or a step is missing or there twice.
    """
    directory = Path(directory)
    path = directory / STEPS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} holds no β record ({STEPS_FILE}). Give the output folder of a run of EpsilonDPOTrainer"
        )
    lines, progress = step_lines(path), progress_of(directory)
    rows = list(map(row_of, lines))
    # An older record does not say at which step it begins; if its first row is there, that is also the distance of all.
    steps_per_row = progress.get("steps_per_row") or (rows[0]["step"] if rows and rows[0] else 1)
    first_step = progress.get("first_step", steps_per_row)
    if "rows" in progress:
        written = progress["rows"][STEPS_FILE]
        problem = not_as_written(lines, written, first_step, steps_per_row)
        if problem is None and len(lines) > written["rows"]:
            problem = f"row {written['rows'] + 1} was added after the run had ended"
    else:
        problem = gap_in(rows, first_step, steps_per_row)
    if problem:
        raise DamagedRecord(path, problem)
    steps = pd.DataFrame(rows, columns=list(STEP_COLUMNS))
    return steps.astype(dict.fromkeys(MAY_BE_MISSING, float))  # as NaN, also where a column has nothing else


def first_and_last_row(directory: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The first and the last row of steps.jsonl by now; None for one that is not there or cannot be read."""
    lines = step_lines(Path(directory) / STEPS_FILE)
    return (row_of(lines[0]), row_of(lines[-1])) if lines else (None, None)


def read_total_steps(directory: str | Path) -> int:
    """How many optimiser steps the record will have when its run has ended."""
    return progress_of(directory)["total_steps"]


def is_begun(directory: str | Path) -> bool:
    """Whether `directory` holds rows of a record, readable or not."""
    directory = Path(directory)
    files = [directory / name for name in (STEPS_FILE, PAIRS_STREAM)]
    if any(path.exists() and path.stat().st_size for path in files):
        return True
    try:
        return len(pair_table_of(directory)) > 0
    except DamagedRecord:
        return True


def first_step(directory: str | Path) -> int:
    """The optimiser step with which a record begins: 1, or a later one where it was begun anew within its run."""
    progress = progress_of(directory)
    first = progress.get("first_step", 1)
    return 1 if first == progress.get("steps_per_row") else first


def read_criterion(directory: str | Path) -> dict[str, str]:
    """In which arithmetic a run decides, and in which the released code would have under its launch.

    Returns:
        arithmetic and released_launch, names as `criterion_dtype` has them; nothing for a run without decisions.
    """
    return progress_of(directory).get("criterion", {})


def incompleteness(directory: str | Path) -> str | None:
    """The sentence that belongs beside the numbers of a record that was begun anew; None of one with all its steps."""
    first = first_step(directory)
    if first == 1:
        return None
    return (
        f"INCOMPLETE: the record begins at step {first}, as the rows of the steps before it were lost. All that is "
        "made of it, β at start too, is of the steps from there on."
    )


def read_done_before(directory: str | Path) -> int:
    """How many of the steps an earlier process did, which the one that writes the record now continues."""
    return progress_of(directory).get("done_before", 0)


def read_pairs(directory: str | Path) -> pd.DataFrame:
    """One row per optimiser step and pair of the run in `directory`; works while it is still training.

    Columns: `PAIR_SCHEMA`. There are none of a method without a reference, or with rows in place of pairs.

    Raises:
        FileNotFoundError: if no run was recorded there.
        DamagedRecord: if the file cannot be read, or has not the pairs of the recorded steps.
    """
    directory = Path(directory)
    if not (directory / PAIRS_FILE).exists() and not (directory / PAIRS_STREAM).exists():
        raise FileNotFoundError(
            f"{directory} holds no β record ({PAIRS_FILE}). Give the output folder of a run of EpsilonDPOTrainer"
        )
    # The steps first: of a run that is still training, pairs are written before their step is.
    steps = read_steps(directory) if (directory / STEPS_FILE).exists() else None
    pairs = pair_table_of(directory).to_pandas()
    if steps is not None:
        _require_pairs_of(steps, pairs, directory / PAIRS_FILE)
    return pairs


def _require_pairs_of(steps: pd.DataFrame, pairs: pd.DataFrame, path: Path) -> None:
    """Refuse pairs that are not, in their number, those of the steps that made decisions."""
    steps = steps.set_index("step")
    found = pairs["step"].value_counts().reindex(steps.index, fill_value=0)
    written = pd.to_numeric(steps["pairs_seen"]).diff()
    # How many there were before the first step is not known of a record that begins in the middle.
    if len(steps) and steps.index[0] == 1:
        written.iloc[0] = steps["pairs_seen"].iloc[0]
    decided = steps["relaxed"].notna()
    wrong = decided & ((found == 0) | ((written > 0) & (found != written)))
    if wrong.any():
        step = wrong.idxmax()
        expected = f"{written[step]:.0f}" if written[step] > 0 else "some"
        raise DamagedRecord(path, f"holds {found[step]} pairs of step {step}, where {expected} were written")


def step_lines(path: Path) -> list[bytes]:
    """The lines of steps.jsonl; a last one without its newline was cut off by a kill and is not a row."""
    content = path.read_bytes() if path.exists() else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it holds none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def lines_up_to(lines: list[bytes], step: int) -> list[bytes]:
    """The first lines, as far as they are rows of no later optimiser step."""
    for number, row in enumerate(map(row_of, lines)):
        if row is None or row["step"] > step:
            return lines[:number]
    return lines


def gap_in(rows: list[dict[str, Any] | None], first_step: int, steps_per_row: int) -> str | None:
    """What is wrong with the first row that is not that of the step which should come there, in words."""
    for number, row in enumerate(rows):
        expected = first_step + number * steps_per_row
        if row is None:
            return f"row {number + 1}, that of step {expected}, cannot be read"
        if row["step"] != expected:
            return f"row {number + 1} is of step {row['step']} instead of {expected}: rows were lost, or came twice"
    return None


def not_as_written(lines: list[bytes], written: dict[str, Any], first_step: int, steps_per_row: int) -> str | None:
    """What became of rows of which number and digest are known, in words; None if they are as they were."""
    count = written["rows"]
    if LineDigest(lines[:count]).value() == written:
        return None
    gap = gap_in(list(map(row_of, lines[:count])), first_step, steps_per_row)
    if gap is None and len(lines) < count:
        return f"holds {len(lines)} of the {count} rows that were written"
    return gap or f"its first {count} rows are not those that were written"


def progress_of(directory: str | Path) -> dict[str, Any]:
    """What progress.json says; nothing where it is not there."""
    path = Path(directory) / PROGRESS_FILE
    with contextlib.suppress(FileNotFoundError, ValueError):
        progress = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(progress, dict):
            return progress
    if path.exists():
        raise DamagedRecord(path, "is not what was written")
    return {}


def pair_table_of(directory: Path) -> pa.Table:
    """Parquet rows, then the stream's later rows: a kill while compacting can leave rows in both."""
    finished = PAIR_SCHEMA.empty_table()
    path = directory / PAIRS_FILE
    if path.exists():
        try:
            finished = pq.read_table(path, schema=PAIR_SCHEMA, page_checksum_verification=True)
            finished.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise DamagedRecord(path, f"cannot be read ({' '.join(str(error).split())})") from None
    growing = pa.Table.from_batches(_stream_batches(directory / PAIRS_STREAM), PAIR_SCHEMA)
    last_step = pa.compute.max(finished["step"]).as_py() or 0
    return pa.concat_tables([finished, growing.filter(pa.compute.greater(growing["step"], last_step))])


def _stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of an Arrow stream whose writer may have been killed in the middle of one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            stream = pa.ipc.open_stream(file)
            if stream.schema != PAIR_SCHEMA:
                raise pa.ArrowInvalid("other columns")
            for batch in stream:
                batch.validate(full=True)
                yield batch
        except (pa.ArrowException, OSError):
            logger.warning("%s ends in the middle of a step; its whole steps are used", path)
