"""The β record of a run: what every optimiser step and every pair did, written as it happens and read back.

This module knows the files and how they survive a killed process. What the numbers mean is the trainer's business,
what they show is `epsdpo.trajectory`'s.

    steps.jsonl     one line per optimiser step
    pairs.parquet   one row per optimiser step and pair; while training runs, the newest rows are in pairs.arrow
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from epsdpo.files import written_whole

logger = logging.getLogger(__name__)

STEPS_FILE, PAIRS_FILE, PAIRS_STREAM = "steps.jsonl", "pairs.parquet", "pairs.arrow"
PROGRESS_FILE = "progress.json"

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
    "reward_accuracy",
    "pairs_seen",  # since the run began
    "seconds",  # of this step
)

MAY_BE_MISSING = ("relaxed", "tied", "tightened", "mean_step", "reward_margin", "log_ratio_margin", "reward_accuracy")


class BetaRecord:
    """Writer of one run's record. Rows reach the file system step by step, so a killed run keeps what it did.

    Args:
        directory: the run's output folder.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._sink = None

    def rewind(self, step: int) -> None:
        """Keep the rows up to optimiser step `step` and drop those after it; 0 starts the record over.

        A run that is resumed from a checkpoint repeats the steps after it, so their first rows must go.
        """
        self.close()
        self.directory.mkdir(parents=True, exist_ok=True)
        rows = list(_complete_lines(self.directory))
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            logger.info(
                "β record: dropping %d steps after step %d, which will be run again", len(rows) - len(kept), step
            )
        with written_whole(self.directory / STEPS_FILE) as path:
            path.write_text("".join(map(_line, kept)), encoding="utf-8")

        pairs = _read_pair_table(self.directory)
        pairs = pairs.filter(pa.compute.less_equal(pairs["step"], step))
        with written_whole(self.directory / PAIRS_FILE) as path:
            pq.write_table(pairs, path)
        (self.directory / PAIRS_STREAM).unlink(missing_ok=True)

    def announce(self, total_steps: int, done_before: int = 0) -> None:
        """Say how many optimiser steps the record will have, and how many an earlier process did, for who watches."""
        with written_whole(self.directory / PROGRESS_FILE) as path:
            path.write_text(json.dumps({"total_steps": total_steps, "done_before": done_before}), encoding="utf-8")

    def append(self, row: dict[str, Any], pairs: pd.DataFrame | None = None) -> None:
        """Add one optimiser step: its row for steps.jsonl, and its pairs.

        Args:
            row: the values of `STEP_COLUMNS`; None for what the method does not have.
            pairs: the columns of `PAIR_SCHEMA` but for ratios and margins, which follow from the log-probabilities;
                None if the method has no table of pairs.
        """
        if pairs is not None:
            self._append_pairs(pairs)
        with (self.directory / STEPS_FILE).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def _append_pairs(self, pairs: pd.DataFrame) -> None:
        if self._stream is None:
            self._sink = (self.directory / PAIRS_STREAM).open("wb")
            self._stream = pa.ipc.new_stream(self._sink, PAIR_SCHEMA)
        table = pa.Table.from_pandas(_with_margins(pairs), schema=PAIR_SCHEMA, preserve_index=False)
        self._stream.write_table(table)
        self._sink.flush()

    def close(self) -> None:
        """Move the pairs from the growing stream into the compressed Parquet file."""
        if self._stream is None:
            return
        self._stream.close()
        self._sink.close()
        self._stream = self._sink = None
        pairs = _read_pair_table(self.directory)
        with written_whole(self.directory / PAIRS_FILE) as path:
            pq.write_table(pairs, path)
        (self.directory / PAIRS_STREAM).unlink()


def read_steps(directory: str | Path) -> pd.DataFrame:
    """One row per optimiser step of the run in `directory`, in order; works while it is still training.

    Columns: `STEP_COLUMNS`.

    Raises:
        FileNotFoundError: if no run was recorded there.
    """
    directory = Path(directory)
    if not (directory / STEPS_FILE).exists():
        raise FileNotFoundError(
            f"{directory} holds no β record ({STEPS_FILE}). Give the output folder of a run of EpsilonDPOTrainer"
        )
    steps = pd.DataFrame(_complete_lines(directory), columns=list(STEP_COLUMNS))
    return steps.astype(dict.fromkeys(MAY_BE_MISSING, float))  # as NaN, also where a column has nothing else


def read_total_steps(directory: str | Path) -> int:
    """How many optimiser steps the record will have when its run has ended."""
    return json.loads((Path(directory) / PROGRESS_FILE).read_text(encoding="utf-8"))["total_steps"]


def read_done_before(directory: str | Path) -> int:
    """How many of the steps an earlier process did, which the one that writes the record now continues."""
    return json.loads((Path(directory) / PROGRESS_FILE).read_text(encoding="utf-8")).get("done_before", 0)


def read_pairs(directory: str | Path) -> pd.DataFrame:
    """One row per optimiser step and pair of the run in `directory`; works while it is still training.

    Columns: `PAIR_SCHEMA`. There are none of a method without a reference, or with rows in place of pairs.

    Raises:
        FileNotFoundError: if no run was recorded there.
    """
    directory = Path(directory)
    if not (directory / PAIRS_FILE).exists() and not (directory / PAIRS_STREAM).exists():
        raise FileNotFoundError(
            f"{directory} holds no β record ({PAIRS_FILE}). Give the output folder of a run of EpsilonDPOTrainer"
        )
    return _read_pair_table(directory).to_pandas()


def _with_margins(pairs: pd.DataFrame) -> pd.DataFrame:
    policy_log_ratio = pairs["chosen_logps"] - pairs["rejected_logps"]
    ref_log_ratio = pairs["ref_chosen_logps"] - pairs["ref_rejected_logps"]
    return pairs.assign(
        policy_log_ratio=policy_log_ratio,
        ref_log_ratio=ref_log_ratio,
        log_ratio_margin=policy_log_ratio - ref_log_ratio,
        reward_margin=pairs["beta"] * (policy_log_ratio - ref_log_ratio),
    )


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _complete_lines(directory: Path) -> Iterator[dict[str, Any]]:
    """The rows of steps.jsonl; a last line without its newline was cut off by a kill and is not a row."""
    path = directory / STEPS_FILE
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _read_pair_table(directory: Path) -> pa.Table:
    """Parquet rows, then the stream's later rows: a kill while compacting can leave rows in both."""
    finished = PAIR_SCHEMA.empty_table()
    if (directory / PAIRS_FILE).exists():
        finished = pq.read_table(directory / PAIRS_FILE, schema=PAIR_SCHEMA)
    growing = pa.Table.from_batches(_stream_batches(directory / PAIRS_STREAM), PAIR_SCHEMA)
    last_step = pa.compute.max(finished["step"]).as_py() or 0
    return pa.concat_tables([finished, growing.filter(pa.compute.greater(growing["step"], last_step))])


def _stream_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The whole batches of an Arrow stream whose writer may have been killed in the middle of one."""
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            yield from pa.ipc.open_stream(file)
        except (pa.ArrowInvalid, OSError):
            logger.warning("%s ends in the middle of a step; its whole steps are used", path)
