"""One split on its way from rows to its Parquet file, with everything that is counted on the way."""

import hashlib
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from epsdpo.data.rows import (
    REFUSALS,
    STANDARD,
    WHOLE_CONVERSATIONS,
    Refused,
    Rendered,
    Tokens,
    check_tokenizer,
    check_tokens,
    cut_prompt,
    described,
    detect_format,
    messages_in_json,
    read_pair,
    render,
    repeats_prompt,
    tokenise,
)
from epsdpo.data.sources import GOLD_COLUMNS, DataError, Rows, missing_column
from epsdpo.files import written_whole
from epsdpo.methods.beside import brings

logger = logging.getLogger(__name__)

PARTS = ("prompt", "chosen", "rejected")

_BATCH_ROWS = 1000
_SECONDS_BETWEEN_LINES = 5.0
_EXAMPLES = 3
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def check_split(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> str:
    """The format of a split, after the checks that concern it as a whole and need no tokens.

    Raises:
        DataError: for a missing prompt column, a tokenizer that cannot write the format, or a repeated pair id.
    """
    data_format = detect_format(rows)
    if data_format is None:
        if any(messages_in_json(row["chosen"]) for row in rows.values[:1]):
            raise DataError(
                f"{rows.where}: chosen is {described(rows.values[0]['chosen'])}, and should be that list itself "
                "(json.loads)"
            )
        raise DataError(
            missing_column(rows.where, "prompt", "prompt", rows.source_columns)
            + ". (Only conversations and transcripts with Human: and Assistant: headers bring their prompt along.)"
        )
    check_tokenizer(tokenizer, data_format)
    first_row: dict[str, int] = {}
    for number, row in enumerate(rows.values):
        pair_id = row.get("pair_id")
        if pair_id is not None and first_row.setdefault(str(pair_id), number) != number:
            raise DataError(
                f"{rows.where}: rows {first_row[str(pair_id)]} and {number} (counted from 0) have the same pair id "
                f"{str(pair_id)!r}. Make the ids unique, or map data.columns.pair_id to another column"
            )
    return data_format


def hold_out(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """The rows to train on, and those of a share of the distinct prompts, drawn by the seed whatever the rows' order.

    Rows that cannot be read stay with the first, where they are counted. Prompts are told apart by what they say; the
    turn of a system, and space around a text, make no other prompt.

    Raises:
        DataError: if there are fewer than two prompts.
    """
    data_format = detect_format(rows)
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows.values if data_format else ()):
        try:
            prompt = read_pair(row, data_format).prompt
        except Refused:
            continue
        if not isinstance(prompt, str):
            turns = ((turn["role"], turn.get("content", "").strip()) for turn in prompt)
            prompt = json.dumps([turn for turn in turns if turn[0] not in ("system", "developer")])
        places.setdefault(prompt.strip(), []).append(place)
    if data_format and len(places) < 2:
        raise DataError(
            f"data.eval_share is {share}, and {rows.where} has {len(places)} usable prompt, so that none can be held "
            "out. Remove it, or add rows"
        )
    drawn = sorted(places, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    drawn = drawn[: min(max(1, round(share * len(places))), len(places) - 1)]
    held_out = sorted(place for key in drawn for place in places[key])
    rest = sorted(set(range(len(rows.values))) - set(held_out))
    return rows.part(rest), rows.part(held_out)


@dataclass
class SplitWriter:
    """Prepares the rows of one split: `write` is to be called once.

    `max_prompt_length` and `max_length` are in tokens; None cuts nothing. `day` is what the chat template is told when
    it asks for today's date.
    """

    name: str
    data_format: str
    tokenizer: PreTrainedTokenizerBase
    max_prompt_length: int | None
    max_length: int | None
    day: str
    refused: dict[str, list[int]] = field(default_factory=dict, init=False)
    messages: dict[str, str] = field(default_factory=dict, init=False)
    counts: Counter = field(default_factory=Counter, init=False)
    written: Counter = field(default_factory=Counter, init=False)  # rows kept, by what they bring for the template
    unused: Counter = field(default_factory=Counter, init=False)  # rows kept, by what the template has no use for
    lost_prompt: dict[str, Any] | None = field(default=None, init=False)
    first_row_with_bos: dict[bool, int] = field(default_factory=dict, init=False)
    numbers: list[int] = field(default_factory=list, init=False)  # of the rows in their source
    lengths: dict[str, list[int]] = field(default_factory=lambda: {part: [] for part in PARTS}, init=False)

    def write(self, rows: Rows, path: Path) -> dict[str, Any]:
        """Write the usable rows to `path` and return the split's section of the report.

        Raises:
            DataError: if no row is usable, or only some of them start with BOS.
        """
        gold = [column for column in GOLD_COLUMNS if column in rows.columns]
        schema = _schema(gold)
        total = len(rows.values)
        self.numbers = rows.numbers
        last_line = time.monotonic()
        with written_whole(path) as partial:
            with pq.ParquetWriter(partial, schema) as writer:
                for start in range(0, total, _BATCH_ROWS):
                    batch = rows.values[start : start + _BATCH_ROWS]
                    writer.write_table(pa.Table.from_pylist(self._prepare(start, batch, gold), schema=schema))
                    if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
                        last_line = time.monotonic()
                        logger.info("%s: %d of %d rows", self.name, start + len(batch), total)
            self._check_result(total)
        kept = len(self.lengths["prompt"])
        logger.info("%s: kept %d of %d rows (%s)", self.name, kept, total, self.data_format)
        return self._report(total, kept, rows.not_used)

    def _prepare(self, start: int, rows: list[dict[str, Any]], gold: list[str]) -> list[dict[str, Any]]:
        """The usable ones of a batch of rows, of which the first has the number `start`."""
        rendered: dict[int, Rendered] = {}
        row_of = dict(zip(self.numbers[start : start + len(rows)], rows, strict=True))
        for number, row in row_of.items():
            try:
                rendered[number] = self._render(row)
            except Refused as refusal:
                self._count_refusal(number, refusal)
        prepared = []
        tokenised = tokenise(list(rendered.values()), self.tokenizer, templated=self.data_format != STANDARD)
        for (number, texts), tokens in zip(rendered.items(), tokenised, strict=True):
            try:
                prompt_ids = self._cut_and_check(tokens)
            except Refused as refusal:
                self._count_refusal(number, refusal)
                continue
            row = row_of[number]
            self._count_kept(number, tokens, prompt_ids)
            self.written.update(brings(row))
            self.unused.update(texts.unused)
            prepared.append(
                {
                    "pair_id": str(row.get("pair_id", f"{self.name}-{number}")),
                    **dict(zip(PARTS, texts.parts(), strict=True)),
                    "prompt_ids": prompt_ids,
                    "chosen_ids": tokens.chosen,
                    "rejected_ids": tokens.rejected,
                    **{column: row[column] for column in gold},
                }
            )
        return prepared

    def _render(self, row: dict[str, Any]) -> Rendered:
        pair = read_pair(row, self.data_format)
        rendered = render(pair, self.tokenizer, self.day)
        if self.data_format == WHOLE_CONVERSATIONS and "prompt" in row:
            self.counts["prompt_text_differs"] += not repeats_prompt(row, pair)
        return rendered

    def _cut_and_check(self, tokens: Tokens) -> list[int]:
        """The ids of the prompt after the cut from the left."""
        check_tokens(tokens, self.tokenizer.bos_token_id)
        prompt_ids = cut_prompt(tokens.prompt, self.max_prompt_length)
        if self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise Refused("prompt_fills_max_length")
        return prompt_ids

    def _count_refusal(self, number: int, refusal: Refused) -> None:
        self.refused.setdefault(refusal.reason, []).append(number)
        if refusal.message:
            self.messages.setdefault(refusal.reason, refusal.message)

    def _count_kept(self, number: int, tokens: Tokens, prompt_ids: list[int]) -> None:
        self.first_row_with_bos.setdefault(tokens.prompt[0] == self.tokenizer.bos_token_id, number)
        for part, ids in zip(PARTS, (prompt_ids, tokens.chosen, tokens.rejected), strict=True):
            self.lengths[part].append(len(ids))
        longest = len(prompt_ids) + max(len(tokens.chosen), len(tokens.rejected))
        self.counts["prompt_cut"] += len(prompt_ids) < len(tokens.prompt)
        self.counts["completion_cut"] += self.max_length is not None and longest > self.max_length
        self.counts["prompt_not_a_prefix"] += bool(tokens.lost_prompt)
        if tokens.lost_prompt and self.lost_prompt is None:
            self.lost_prompt = {"row": number, "left_out": self.tokenizer.decode(tokens.lost_prompt)}
            logger.warning(
                "%s, row %d: the prompt tokenised alone is no prefix of prompt + completion; its end %r is left out of "
                "training. This is said once; the report counts the rows",
                *(self.name, number, self.lost_prompt["left_out"]),
            )

    def _check_result(self, total: int) -> None:
        if not self.lengths["prompt"]:
            reasons = [
                f"  {reason}: {entry['rows']} rows, first {entry['examples']}: {entry.get('message', entry['meaning'])}"
                for reason, entry in self._refusals().items()
            ]
            head = f"split {self.name!r} ({self.data_format}): none of {total} rows can be used"
            raise DataError("\n".join([head, *reasons]))
        if len(self.first_row_with_bos) > 1:
            raise DataError(
                f"split {self.name!r}: row {self.first_row_with_bos[True]} starts with BOS, row "
                f"{self.first_row_with_bos[False]} does not. Some texts bring their own; remove it from them"
            )

    def _refusals(self) -> dict[str, dict[str, Any]]:
        """Reason -> how many rows, the first of them, and what the reason means; in the order of `REFUSALS`."""
        table: dict[str, dict[str, Any]] = {}
        for reason in filter(self.refused.__contains__, REFUSALS):
            rows = sorted(self.refused[reason])
            table[reason] = {"rows": len(rows), "examples": rows[:_EXAMPLES], "meaning": REFUSALS[reason]}
            if reason in self.messages:
                table[reason]["message"] = self.messages[reason]
        return table

    def _report(self, total: int, kept: int, not_used: dict[str, int]) -> dict[str, Any]:
        return {
            "name": self.name,
            "format": self.data_format,
            "rows_read": total,
            "rows_kept": kept,
            "refused": self._refusals(),
            "truncated": {"prompt": self.counts["prompt_cut"], "completion": self.counts["completion_cut"]},
            "bos_per_sequence": int(True in self.first_row_with_bos),
            "prompt_not_a_prefix": {"rows": self.counts["prompt_not_a_prefix"], "example": self.lost_prompt},
            "prompt_text_differs": self.counts["prompt_text_differs"],
            "written_beside": dict(self.written),
            "not_used": {**not_used, **self.unused},
            "tokens": {part: quantiles(self.lengths[part]) for part in PARTS},
        }


def quantiles(lengths: list[int]) -> dict[str, float]:
    """Mean and quantiles of token counts; the quantiles are counts that occur, not interpolated."""
    values = np.quantile(lengths, list(_QUANTILES.values()), method="lower")
    return {"mean": round(float(np.mean(lengths)), 1), **dict(zip(_QUANTILES, values.tolist(), strict=True))}


def _schema(gold: list[str]) -> pa.Schema:
    texts = [(name, pa.string()) for name in ("pair_id", *PARTS)]
    ids = [(f"{part}_ids", pa.list_(pa.int32())) for part in PARTS]
    return pa.schema([*texts, *ids, *((column, pa.float64()) for column in gold)])
