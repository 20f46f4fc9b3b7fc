"""Judging a set of comparisons: what was asked before is read, the rest is asked, every answer is kept as it comes.

This module knows the order of the work and what a record holds. Asking is left to the judge, files to
`epsdpo.evaluation.judges.store`, numbers to `epsdpo.evaluation.judges.counts`.
"""

import hashlib
import json
import logging
import math
import time
from datetime import UTC, datetime
from typing import Any

from epsdpo.evaluation.judges.answers import NOT_FINITE
from epsdpo.evaluation.judges.comparison import (
    Answer,
    Comparison,
    Failure,
    Judge,
    Judgement,
    Presentation,
    presentations,
)
from epsdpo.evaluation.judges.store import JudgementStore

logger = logging.getLogger(__name__)

DRAW = 1.5
_SECONDS_BETWEEN_PROGRESS_LINES = 5.0


def judge_comparisons(comparisons: list[Comparison], judge: Judge, store: JudgementStore | None) -> list[Judgement]:
    """Judge each comparison, in the order given; equal requests are asked once.

    Identical outputs are a draw without asking. In order "both" the preference is the mean of the two.

    Args:
        store: an open one; None keeps nothing, for a judge that costs nothing to ask again.

    Raises:
        JudgeError: if the judge cannot be asked. What it said before is kept, and the same call goes on from there.
    """
    shown = [presentations(comparison, judge.order) for comparison in comparisons]
    requests = {presentation: judge.request(presentation) for group in shown for presentation in group}
    keys = {presentation: content_key(request, presentation) for presentation, request in requests.items()}
    by_key = {key: presentation for presentation, key in keys.items()}
    records = {key: record for key in by_key if store is not None and (record := store.get(key)) is not None}
    failures: dict[str, Failure] = {}
    pending = [key for key in by_key if key not in records]
    drawn = sum(not group for group in shown)
    logger.info(
        "%d comparisons for %s: %d answers to ask for, %d kept from before, %d identical outputs",
        len(comparisons), judge.name, len(pending), len(records), drawn,
    )  # fmt: skip
    progress = _Progress(len(pending))

    def deliver(number: int, outcome: Answer | Failure) -> None:
        key = pending[number]
        if isinstance(outcome, Answer) and not math.isfinite(outcome.second_wins):  # half precision that overflowed
            outcome = Failure(NOT_FINITE, repr(outcome.evidence))
        if isinstance(outcome, Failure):
            failures[key] = outcome
            if store is not None:
                store.add_failure(_failure_record(key, judge, by_key[key], outcome))
        else:
            record = _record(key, judge, by_key[key], outcome)
            records[key] = record if store is None else store.add(record)
        progress.count(failed=isinstance(outcome, Failure))

    if pending:
        judge.answer([by_key[key] for key in pending], deliver)
    return [_judgement([(item, keys[item]) for item in group], records, failures) for group in shown]


def content_key(request: dict[str, Any], presentation: Presentation) -> str:
    """SHA-256 of everything that the preference depends on: the judge's request, and which output is the model's."""
    content = json.dumps([request, presentation.switched], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _judgement(
    asked: list[tuple[Presentation, str]], records: dict[str, dict[str, Any]], failures: dict[str, Failure]
) -> Judgement:
    found = {presentation.switched: records[key] for presentation, key in asked if key in records}
    if len(found) < len(asked):
        unanswered = next(key for _, key in asked if key not in records)
        # A judge that does not answer for a presentation has lost it, which must show and not pass for a draw.
        return Judgement(None, found, failures.get(unanswered, Failure("never answered")))
    preferences = [record["preference"] for record in found.values()] or [DRAW]
    return Judgement(sum(preferences) / len(preferences), found)


def _record(key: str, judge: Judge, presentation: Presentation, answer: Answer) -> dict[str, Any]:
    return {
        **_about(key, judge, presentation),
        "preference": presentation.preference(answer.second_wins),
        "answer": answer.evidence,
        "usage": answer.usage,
        "served_model": answer.served_model,
    }


def _failure_record(key: str, judge: Judge, presentation: Presentation, failure: Failure) -> dict[str, Any]:
    return {**_about(key, judge, presentation), "reason": failure.reason, "detail": failure.detail}


def _about(key: str, judge: Judge, presentation: Presentation) -> dict[str, Any]:
    return {
        "key": key,
        "judge": judge.name,
        "instruction": presentation.comparison.instruction,
        "is_switched": presentation.switched,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class _Progress:
    """A line every few seconds, and one at the end."""

    def __init__(self, total: int):
        self._total, self._done, self._failed = total, 0, 0
        self._started = self._reported = time.monotonic()

    def count(self, failed: bool) -> None:
        self._done += 1
        self._failed += failed
        now = time.monotonic()
        if now - self._reported > _SECONDS_BETWEEN_PROGRESS_LINES or self._done == self._total:
            left = (now - self._started) / self._done * (self._total - self._done)
            logger.info("asked %d of %d, %d failed, about %.0f s left", self._done, self._total, self._failed, left)
            self._reported = now
