"""The β record of a run: what every optimiser step and every pair did, written as it happens and read back.

This module knows the files, how they survive a killed process, and whether they still say what was written. What the
numbers mean is the trainer's business, what they show is `epsdpo.trajectory.summary`'s.

    steps.jsonl     one line per optimiser step
    pairs.parquet   one row per optimiser step and pair; while training runs, the newest rows are in pairs.arrow
    progress.json   how many steps there will be, with which the record begins, and how many rows a finished one has
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

from epsdpo.files import flush_to_disk, written_whole
from epsdpo.methods.row_digests import LineDigest, TableDigest

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
    "reward_accuracy",  # like the reward margin, of the pairs that are in the loss
    "pairs_seen",  # since the run began
    "seconds",  # of this step
)

MAY_BE_MISSING = ("relaxed", "tied", "tightened", "mean_step", "reward_margin", "log_ratio_margin", "reward_accuracy")


class DamagedRecord(ValueError):
    """A record that is not what was written. The message names the file, the row where there is one, and the remedy."""

    def __init__(self, path: Path, problem: str):
        super().__init__(
            f"{path}: {problem}. A run that has not ended goes back, when it is continued, to its last checkpoint "
            "whose rows are whole. Of one that has, restore the file from a copy, or train it again in another folder"
        )


class StepRecord:
    """Writer of steps.jsonl. Rows reach the file system as they are made, so a killed run keeps what it did.

    Args:
        directory: the run's output folder.
        steps_per_row: optimiser steps from one row to the next.
    """

    def __init__(self, directory: str | Path, steps_per_row: int = 1):
        self.directory = Path(directory)
        self.steps_per_row = steps_per_row
        self.first_step = steps_per_row
        self._steps = LineDigest()
        self._total_steps: int | None = None
        self._done_before = 0

    def rewind(self, step: int) -> None:
        """Keep the rows up to optimiser step `step` and drop those after it; 0 starts the record over.

        A run that is resumed from a checkpoint repeats the steps after it, so their first rows must go. Where there is
        no row to keep, the record begins after that step.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = _lines(self.directory / STEPS_FILE)
        kept = _up_to(lines, step)
        if len(kept) < len(lines):
            logger.info("record: dropping %d rows after step %d, which will be run again", len(lines) - len(kept), step)
        self.first_step = _row(kept[0])["step"] if kept else (step // self.steps_per_row + 1) * self.steps_per_row
        self._steps = LineDigest(kept)
        with written_whole(self.directory / STEPS_FILE) as path:
            path.write_bytes(b"".join(kept))

    def announce(self, total_steps: int, done_before: int = 0) -> None:
        """Say how many optimiser steps the record will have, and how many an earlier process did, for who watches."""
        self._total_steps, self._done_before = total_steps, done_before
        self._write_progress()

    def append(self, row: dict[str, Any]) -> None:
        """Add a row to steps.jsonl: the values of `STEP_COLUMNS`, None for what the method does not have."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with (self.directory / STEPS_FILE).open("ab") as file:
            file.write(line)
        self._steps.add(line)

    def finish(self) -> None:
        """End the record, and say how many rows it has, so that one that loses some is known."""
        self._write_progress(rows=self.rows())

    def rows(self) -> dict[str, Any]:
        """How many rows each file has by now, and their digest, for `missing`; when it returns they are on the disk."""
        flush_to_disk(self.directory / STEPS_FILE)
        return {"first_step": self.first_step, STEPS_FILE: self._steps.value()}

    def missing(self, rows: dict[str, Any]) -> str | None:
        """In words, what is not there any more, or not as it was, of what `rows` told; None if all is."""
        path = self.directory / STEPS_FILE
        problem = _not_as_written(_lines(path), rows[STEPS_FILE], rows["first_step"], self.steps_per_row)
        return problem and f"{path}: {problem}"

    def holds(self, step: int) -> bool:
        """Whether the rows up to optimiser step `step` follow one another without a gap, as far as can be seen."""
        rows = list(map(_row, _up_to(_lines(self.directory / STEPS_FILE), step)))
        return len(rows) == step // self.steps_per_row and _gap(rows, self.steps_per_row, self.steps_per_row) is None

    def _write_progress(self, **more: Any) -> None:
        content = {
            "total_steps": self._total_steps,
            "done_before": self._done_before,
            "first_step": self.first_step,
            "steps_per_row": self.steps_per_row,
            **more,
        }
        with written_whole(self.directory / PROGRESS_FILE) as path:
            path.write_text(json.dumps(content), encoding="utf-8")


class BetaRecord(StepRecord):
    """Writer of one run's record: its steps, and for methods that compare pairs with a reference its pairs.

    Args:
        directory: the run's output folder.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        self._pairs = TableDigest(PAIR_SCHEMA.empty_table())
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._sink = None

    def rewind(self, step: int) -> None:
        self.close()
        super().rewind(step)
        pairs = _read_pair_table(self.directory) if step else PAIR_SCHEMA.empty_table()
        pairs = pairs.filter(pa.compute.less_equal(pairs["step"], step))
        self._pairs = TableDigest(pairs)
        self._write_pairs(pairs)
        (self.directory / PAIRS_STREAM).unlink(missing_ok=True)

    def append(self, row: dict[str, Any], pairs: pd.DataFrame | None = None) -> None:
        """Add one optimiser step: its row for steps.jsonl, and its pairs.

        Args:
            row: the values of `STEP_COLUMNS`; None for what the method does not have.
            pairs: the columns of `PAIR_SCHEMA` but for ratios and margins, which follow from the log-probabilities;
                None if the method has no table of pairs.
        """
        if pairs is not None:
            self._append_pairs(pairs)
        super().append(row)

    def _append_pairs(self, pairs: pd.DataFrame) -> None:
        if self._stream is None:
            self._sink = (self.directory / PAIRS_STREAM).open("wb")
            self._stream = pa.ipc.new_stream(self._sink, PAIR_SCHEMA)
        table = pa.Table.from_pandas(_with_margins(pairs), schema=PAIR_SCHEMA, preserve_index=False)
        self._stream.write_table(table)
        self._sink.flush()
        self._pairs.add(table)

    def close(self) -> None:
        """Move the pairs from the growing stream into the compressed Parquet file."""
        if self._stream is None:
            return
        self._stream.close()
        self._sink.close()
        self._stream = self._sink = None
        self._write_pairs(_read_pair_table(self.directory))
        (self.directory / PAIRS_STREAM).unlink()

    def finish(self) -> None:
        self.close()
        super().finish()

    def rows(self) -> dict[str, Any]:
        flush_to_disk(self.directory / (PAIRS_FILE if self._stream is None else PAIRS_STREAM))
        return {**super().rows(), PAIRS_FILE: self._pairs.value()}

    def missing(self, rows: dict[str, Any]) -> str | None:
        return super().missing(rows) or self._missing_pairs(**rows[PAIRS_FILE])

    def _missing_pairs(self, rows: int, sha256: str) -> str | None:
        place = f"{self.directory / PAIRS_FILE} and {PAIRS_STREAM}"
        try:
            pairs = _read_pair_table(self.directory)
        except DamagedRecord as damage:
            return str(damage)
        if len(pairs) < rows:
            return f"{place} hold {len(pairs)} of the {rows} rows that were written"
        if TableDigest(pairs.slice(0, rows)).value()["sha256"] != sha256:
            return f"the first {rows} rows of {place} are not those that were written"
        return None

    def _write_pairs(self, pairs: pa.Table) -> None:
        with written_whole(self.directory / PAIRS_FILE) as path:
            pq.write_table(pairs, path, write_page_checksum=True)


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
    lines, progress = _lines(path), _progress(directory)
    rows = list(map(_row, lines))
    # An older record does not say at which step it begins; if its first row is there, that is also the distance of all.
    steps_per_row = progress.get("steps_per_row") or (rows[0]["step"] if rows and rows[0] else 1)
    first_step = progress.get("first_step", steps_per_row)
    if "rows" in progress:
        written = progress["rows"][STEPS_FILE]
        problem = _not_as_written(lines, written, first_step, steps_per_row)
        if problem is None and len(lines) > written["rows"]:
            problem = f"row {written['rows'] + 1} was added after the run had ended"
    else:
        problem = _gap(rows, first_step, steps_per_row)
    if problem:
        raise DamagedRecord(path, problem)
    steps = pd.DataFrame(rows, columns=list(STEP_COLUMNS))
    return steps.astype(dict.fromkeys(MAY_BE_MISSING, float))  # as NaN, also where a column has nothing else


def first_and_last_row(directory: str | Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The first and the last row of steps.jsonl by now; None for one that is not there or cannot be read."""
    lines = _lines(Path(directory) / STEPS_FILE)
    return (_row(lines[0]), _row(lines[-1])) if lines else (None, None)


def read_total_steps(directory: str | Path) -> int:
    """How many optimiser steps the record will have when its run has ended."""
    return _progress(directory)["total_steps"]


def is_begun(directory: str | Path) -> bool:
    """Whether `directory` holds rows of a record, readable or not."""
    directory = Path(directory)
    files = [directory / name for name in (STEPS_FILE, PAIRS_STREAM)]
    if any(path.exists() and path.stat().st_size for path in files):
        return True
    try:
        return len(_read_pair_table(directory)) > 0
    except DamagedRecord:
        return True


def first_step(directory: str | Path) -> int:
    """The optimiser step with which a record begins: 1, or a later one where it was begun anew within its run."""
    progress = _progress(directory)
    first = progress.get("first_step", 1)
    return 1 if first == progress.get("steps_per_row") else first


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
    return _progress(directory).get("done_before", 0)


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
    pairs = _read_pair_table(directory).to_pandas()
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


def _with_margins(pairs: pd.DataFrame) -> pd.DataFrame:
    policy_log_ratio = pairs["chosen_logps"] - pairs["rejected_logps"]
    ref_log_ratio = pairs["ref_chosen_logps"] - pairs["ref_rejected_logps"]
    return pairs.assign(
        policy_log_ratio=policy_log_ratio,
        ref_log_ratio=ref_log_ratio,
        log_ratio_margin=policy_log_ratio - ref_log_ratio,
        reward_margin=pairs["beta"] * (policy_log_ratio - ref_log_ratio),
    )


def _lines(path: Path) -> list[bytes]:
    """The lines of steps.jsonl; a last one without its newline was cut off by a kill and is not a row."""
    content = path.read_bytes() if path.exists() else b""
    return [line + b"\n" for line in content.split(b"\n")[:-1]]


def _row(line: bytes) -> dict[str, Any] | None:
    """The row that a line holds; None if it holds none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _up_to(lines: list[bytes], step: int) -> list[bytes]:
    """The first lines, as far as they are rows of no later optimiser step."""
    for number, row in enumerate(map(_row, lines)):
        if row is None or row["step"] > step:
            return lines[:number]
    return lines


def _gap(rows: list[dict[str, Any] | None], first_step: int, steps_per_row: int) -> str | None:
    """What is wrong with the first row that is not that of the step which should come there, in words."""
    for number, row in enumerate(rows):
        expected = first_step + number * steps_per_row
        if row is None:
            return f"row {number + 1}, that of step {expected}, cannot be read"
        if row["step"] != expected:
            return f"row {number + 1} is of step {row['step']} instead of {expected}: rows were lost, or came twice"
    return None


def _not_as_written(lines: list[bytes], written: dict[str, Any], first_step: int, steps_per_row: int) -> str | None:
    """What became of rows of which number and digest are known, in words; None if they are as they were."""
    count = written["rows"]
    if LineDigest(lines[:count]).value() == written:
        return None
    gap = _gap(list(map(_row, lines[:count])), first_step, steps_per_row)
    if gap is None and len(lines) < count:
        return f"holds {len(lines)} of the {count} rows that were written"
    return gap or f"its first {count} rows are not those that were written"


def _progress(directory: str | Path) -> dict[str, Any]:
    """What progress.json says; nothing where it is not there."""
    path = Path(directory) / PROGRESS_FILE
    with contextlib.suppress(FileNotFoundError, ValueError):
        progress = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(progress, dict):
            return progress
    if path.exists():
        raise DamagedRecord(path, "is not what was written")
    return {}


def _read_pair_table(directory: Path) -> pa.Table:
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
