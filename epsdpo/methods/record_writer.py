"""Writing the β record of a run as it trains, so that a killed process keeps what it did and a resumed one goes on."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from epsdpo.files import flush_to_disk, written_whole
from epsdpo.methods.record import (
    PAIR_SCHEMA,
    PAIRS_FILE,
    PAIRS_STREAM,
    PROGRESS_FILE,
    STEPS_FILE,
    DamagedRecord,
    gap_in,
    lines_up_to,
    not_as_written,
    pair_table_of,
    row_of,
    step_lines,
)
from epsdpo.methods.row_digests import LineDigest, TableDigest

logger = logging.getLogger(__name__)


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
        self.criterion: dict[str, str] = {}
        self._total_steps: int | None = None
        self._done_before = 0

    def rewind(self, step: int) -> None:
        """Keep the rows up to optimiser step `step` and drop those after it; 0 starts the record over.

        A run that is resumed from a checkpoint repeats the steps after it, so their first rows must go. Where there is
        no row to keep, the record begins after that step.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = step_lines(self.directory / STEPS_FILE)
        kept = lines_up_to(lines, step)
        if len(kept) < len(lines):
            logger.info("record: dropping %d rows after step %d, which will be run again", len(lines) - len(kept), step)
        self.first_step = row_of(kept[0])["step"] if kept else (step // self.steps_per_row + 1) * self.steps_per_row
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
        problem = not_as_written(step_lines(path), rows[STEPS_FILE], rows["first_step"], self.steps_per_row)
        return problem and f"{path}: {problem}"

    def holds(self, step: int) -> bool:
        """Whether the rows up to optimiser step `step` follow one another without a gap, as far as can be seen."""
        rows = list(map(row_of, lines_up_to(step_lines(self.directory / STEPS_FILE), step)))
        return len(rows) == step // self.steps_per_row and gap_in(rows, self.steps_per_row, self.steps_per_row) is None

    def _write_progress(self, **more: Any) -> None:
        content = {
            "total_steps": self._total_steps,
            "done_before": self._done_before,
            "first_step": self.first_step,
            "steps_per_row": self.steps_per_row,
            **({"criterion": self.criterion} if self.criterion else {}),
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
        pairs = pair_table_of(self.directory) if step else PAIR_SCHEMA.empty_table()
        pairs = pairs.filter(pa.compute.less_equal(pairs["step"], step))
        self._pairs = TableDigest(pairs)
        self._write_pairs(pairs)
        (self.directory / PAIRS_STREAM).unlink(missing_ok=True)

    def append(self, row: dict[str, Any], pairs: Mapping[str, Any] | None = None) -> None:
        """Add one optimiser step: its row for steps.jsonl, and its pairs.

        Args:
            row: the values of `STEP_COLUMNS`; None for what the method does not have.
            pairs: the columns of `PAIR_SCHEMA`, in a table or as arrays, but for ratios and margins, which follow
                from the log-probabilities; None if the method has no table of pairs.
        """
        if pairs is not None:
            self._append_pairs(pairs)
        super().append(row)

    def _append_pairs(self, pairs: Mapping[str, Any]) -> None:
        if self._stream is None:
            self._sink = (self.directory / PAIRS_STREAM).open("wb")
            self._stream = pa.ipc.new_stream(self._sink, PAIR_SCHEMA)
        table = _as_table(pairs)
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
        self._write_pairs(pair_table_of(self.directory))
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
            pairs = pair_table_of(self.directory)
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


def _as_table(pairs: Mapping[str, Any]) -> pa.Table:
    columns = {name: np.asarray(pairs[name]) for name in PAIR_SCHEMA.names if name in pairs}
    policy_log_ratio = columns["chosen_logps"] - columns["rejected_logps"]
    ref_log_ratio = columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    columns |= {
        "policy_log_ratio": policy_log_ratio,
        "ref_log_ratio": ref_log_ratio,
        "log_ratio_margin": policy_log_ratio - ref_log_ratio,
        "reward_margin": columns["beta"] * (policy_log_ratio - ref_log_ratio),
    }
    arrays = [pa.array(columns[field.name], type=field.type, from_pandas=True) for field in PAIR_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=PAIR_SCHEMA)
