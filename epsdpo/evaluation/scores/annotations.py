"""Files of judgements: AlpacaEval's `annotations.json`, read and written, and its reduced form without the texts.

A file that cannot be what it says is refused.
"""

import gzip
import json
import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from epsdpo.evaluation.judges.answers import IMPROBABLE, remedies_for, still_an_answer
from epsdpo.files import text_of, writable, written_whole

logger = logging.getLogger(__name__)

OFFICIAL_KEYS = ("instruction", "output_1", "generator_1", "output_2", "generator_2", "annotator", "preference")

# What AlpacaEval's package stores for a judgement that failed.
_FAILED = -1
_GZIP = b"\x1f\x8b"


class InputError(ValueError):
    """A file that cannot be evaluated. The message names the file, the row, the key, the value and the remedy."""


@dataclass(frozen=True)
class Annotations:
    """One judge's judgements of one model against one reference.

    Attributes:
        path: where they were read.
        model: `generator_2`; None where the file does not say.
        reference: `generator_1`, likewise.
        annotator: the judge, likewise.
        prompts: one row per prompt, in the file's order: instruction; preference, from 1 (the reference wins) to 2 (the
            model wins), NaN where judging failed; model_length and reference_length in characters, NaN where a prompt
            without preference has no output.
    """

    path: Path
    model: str | None
    reference: str | None
    annotator: str | None
    prompts: pd.DataFrame

    @property
    def of_itself(self) -> bool:
        """Whether both sides have one name: a model, compared with itself."""
        return self.model is not None and self.model == self.reference


def read_annotations(path: str | Path) -> Annotations:
    """Read judgements: a JSON list of objects, plain or gzipped.

    Each has `instruction` and `preference`, and for both sides the text (`output_1`, `output_2`) or its number of
    characters (`len_1`, `len_2`). A preference that is null, NaN, -1 or absent is a judgement that failed; 0 is
    AlpacaEval's old way to write a draw. Every row counts, none is dropped. Where a row keeps the judge's
    log-probabilities and these have next to nothing on its identifiers m and M, its judgement failed, too, and a
    warning is logged.

    Raises:
        InputError: if the file is missing or not such a list, a value is not what it should be, an instruction comes
            twice, or rows name different models, references or judges.
    """
    path = Path(path)
    return _annotations(path, read_rows(path))


def write_annotations(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write judgements as AlpacaEval's `annotations.json`, gzipped if the name ends in .gz; whole or not at all.

    What UTF-8 cannot write is replaced. What is written reads back by `read_annotations` and by
    the `alpaca_eval` package. Keys beside AlpacaEval's are kept. A failed judgement has the preference None or NaN and
    is written as null, never left out.

    Raises:
        InputError: if a row lacks one of `OFFICIAL_KEYS`, or `read_annotations` would refuse the file.
    """
    path, rows = Path(path), writable(rows)
    for number, row in enumerate(rows):
        missing = [key for key in OFFICIAL_KEYS if key not in row]
        if missing:
            raise InputError(f"{path}: row {number} to be written has no `{missing[0]}`")
    preferences = _annotations(path, rows).prompts["preference"]
    whole = [
        {**row, "preference": None if math.isnan(value) else value}
        for row, value in zip(rows, preferences, strict=True)
    ]
    text = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False).encode("utf-8")
    with written_whole(path) as partial:
        # Without a time stamp, so that the same judgements make the same file.
        partial.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text + b"\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list, plain or gzipped.

    Raises:
        InputError: if the file is missing or not such a list.
    """
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        rows = writable(json.loads(text_of(content)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: its gzip stream is cut or damaged: {error}. Fetch or write it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 or UTF-16 text: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}. It should be a list of objects, one per prompt") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path}: not a list of judgements but {_quote(rows)}. It should be a list, one object per prompt"
        )
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is {_quote(row)}, not an object")
    return rows


def _annotations(path: Path, rows: Sequence[dict[str, Any]]) -> Annotations:
    prompts, first_rows = [], {}
    for number, row in enumerate(rows):
        prompts.append(_prompt(path, number, row))
        instruction = prompts[-1]["instruction"]
        if instruction in first_rows:
            raise InputError(
                f"{path}: row {number}: `instruction` {_quote(instruction)} repeats that of row "
                f"{first_rows[instruction]}. A file holds each prompt once: write repetitions to files of their own"
            )
        first_rows[instruction] = number
    improbable = sum(not _rests_on_answers(row) for row in rows)
    if improbable:
        logger.warning(
            "%s: %d of %d judgements count as failed: by their log-probabilities %s. %s",
            *(path, improbable, len(rows), IMPROBABLE, " ".join(remedies_for([IMPROBABLE]))),
        )
    outputs = [(row.get("output_1"), row.get("output_2")) for row in rows]
    if all(isinstance(first, str) and first == second for first, second in outputs):
        logger.warning("%s: in each row the two outputs are the same: one model, whatever its sides are called", path)
    return Annotations(
        path=path,
        model=_common(path, rows, "generator_2"),
        reference=_common(path, rows, "generator_1"),
        annotator=_common(path, rows, "annotator"),
        prompts=pd.DataFrame(prompts),
    )


def _prompt(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    instruction = row.get("instruction")
    if not isinstance(instruction, str):
        raise InputError(f"{path}: row {number}: `instruction` is {_quote(instruction)}, not a text")
    value = _preference(path, number, row)
    return {
        "instruction": instruction,
        "preference": value,
        "model_length": _length(path, number, row, "2", judged=not math.isnan(value)),
        "reference_length": _length(path, number, row, "1", judged=not math.isnan(value)),
    }


def _preference(path: Path, number: int, row: dict[str, Any]) -> float:
    """In [1, 2], or NaN for a judgement that failed."""
    value = row.get("preference")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: row {number}: `preference` is {_quote(value)}, not a number from 1 to 2, nor null")
    if math.isnan(value) or value == _FAILED or not _rests_on_answers(row):
        return math.nan
    if value == 0:
        return 1.5
    if not 1 <= value <= 2:
        raise InputError(
            f"{path}: row {number}: `preference` is {value:g}, outside [1, 2]: 1 says that output_1 wins, 2 that "
            "output_2 wins, null that judging failed"
        )
    return float(value)


def _rests_on_answers(row: dict[str, Any]) -> bool:
    """Whether what the row keeps of the judge's words, in each order that it was asked in, is an answer."""
    kept = row.get("raw_completion")
    return all(map(still_an_answer, [row, *(kept if isinstance(kept, list) else [kept])]))


def _length(path: Path, number: int, row: dict[str, Any], side: str, judged: bool) -> float:
    """Characters of one side's output; NaN only if there is none and the prompt was not judged."""
    output, length = row.get(f"output_{side}"), row.get(f"len_{side}")
    if isinstance(output, str):
        return float(len(output))
    if output is None and isinstance(length, int) and not isinstance(length, bool) and length >= 0:
        return float(length)
    if output is None and length is None and not judged:
        return math.nan
    key, value = (f"output_{side}", output) if length is None else (f"len_{side}", length)
    raise InputError(
        f"{path}: row {number}: `{key}` is {_quote(value)}. A judged prompt has the text `output_{side}` or its number "
        f"of characters `len_{side}`"
    )


def _common(path: Path, rows: Sequence[dict[str, Any]], key: str) -> str | None:
    """The one value that all rows have under `key`; None where all lack it."""
    first = rows[0].get(key)
    for number, row in enumerate(rows):
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}: row {number}: `{key}` is {_quote(value)}, not a text")
        if value != first:
            raise InputError(
                f"{path}: row {number}: `{key}` is {_quote(value)}, in row 0 it is {_quote(first)}. "
                "A file holds one model, one reference and one judge: split it"
            )
    return first


def _quote(value: Any) -> str:
    """A value as JSON, cut to the length of a message's line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
