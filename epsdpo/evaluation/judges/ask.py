"""Judging a set of comparisons: what was asked before is read, the rest is asked, every answer is kept as it comes.

judgements.jsonl   {"key": …, "judge": …, "preference": 1.93, "answer": …}   answers only
failures.jsonl     {"key": …, "reason": …, "detail": …}   a log that nobody reads back: what failed is asked again
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epsdpo.evaluation.judges.answers import NOT_FINITE, still_an_answer
from epsdpo.evaluation.judges.comparison import Answer, Comparison, Judge, Judgement, Presentation, presentations
from epsdpo.models.kept import Kept, append_lines, ask_missing
from epsdpo.models.response import Failure

logger = logging.getLogger(__name__)

JUDGEMENTS = "judgements.jsonl"
FAILURES = "failures.jsonl"
DRAW = 1.5


def judge_comparisons(comparisons: list[Comparison], judge: Judge, folder: Path | None = None) -> list[Judgement]:
    """Judge each comparison, in the order given; equal requests are asked once.

    Identical outputs are a draw without asking. In order "both" the preference is the mean of the two.

    Args:
        folder: where answers are kept; None keeps nothing, for a judge that costs nothing to ask again.

    Raises:
        JudgeError: if the judge cannot be asked. What it said before is kept, and the same call goes on from there.
        ValueError: if another process judges into the folder, or what is kept there is no judgement.
    """
    shown = [presentations(comparison, judge.order) for comparison in comparisons]
    keys = {item: content_key(judge.request(item), item) for group in shown for item in group}
    wanted = {key: presentation for presentation, key in keys.items()}
    drawn = sum(not group for group in shown)
    logger.info("%d comparisons for %s, %d of them of identical outputs", len(comparisons), judge.name, drawn)

    def answers(items: Sequence[Presentation], missing: Sequence[bool]) -> Iterator[dict[int, Answer | Failure]]:
        for found in judge.answers(items, missing):
            yield {number: _finite(outcome) for number, outcome in found.items()}

    def record(key: str, presentation: Presentation, answer: Answer) -> dict[str, Any]:
        return {
            **_about(key, judge, presentation),
            "preference": presentation.preference(answer.second_wins),
            "answer": answer.evidence,
            "usage": answer.usage,
            "served_model": answer.served_model,
        }

    def failed(key: str, presentation: Presentation, failure: Failure) -> None:
        if folder is not None:
            about = _about(key, judge, presentation)
            append_lines(folder / FAILURES, [{**about, "reason": failure.reason, "detail": failure.detail}])

    with Kept(None if folder is None else folder / JUDGEMENTS, _read) as kept:
        if folder is not None:
            append_lines(folder / FAILURES, [])
        failures = ask_missing(wanted, kept, answers, record, judge.name, failed)
        return [_judgement([(item, keys[item]) for item in group], kept, failures) for group in shown]


def content_key(request: dict[str, Any], presentation: Presentation) -> str:
    """SHA-256 of everything that the preference depends on: the judge's request, and which output is the model's."""
    content = json.dumps([request, presentation.switched], sort_keys=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _judgement(asked: list[tuple[Presentation, str]], kept: Kept, failures: dict[str, Failure]) -> Judgement:
    found = {presentation.switched: kept[key] for presentation, key in asked if key in kept}
    if len(found) < len(asked):
        unanswered = next(key for _, key in asked if key not in kept)
        # A judge that does not answer for a presentation has lost it, which must show and not pass for a draw.
        return Judgement(None, found, failures.get(unanswered, Failure("never answered")))
    preferences = [record["preference"] for record in found.values()] or [DRAW]
    return Judgement(sum(preferences) / len(preferences), found)


def _finite(outcome: Answer | Failure) -> Answer | Failure:
    if isinstance(outcome, Answer) and not math.isfinite(outcome.second_wins):  # half precision that overflowed
        return Failure(NOT_FINITE, repr(outcome.evidence))
    return outcome


def _about(key: str, judge: Judge, presentation: Presentation) -> dict[str, Any]:
    return {
        "key": key,
        "judge": judge.name,
        "instruction": presentation.comparison.instruction,
        "is_switched": presentation.switched,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(record: dict[str, Any]) -> dict[str, Any] | None:
    """A record as it was kept; None for one of a judge that had next to nothing on either identifier."""
    preference = record["preference"]
    if type(preference) not in (int, float) or not 1.0 <= preference <= 2.0 or not isinstance(record["key"], str):
        raise ValueError(f"a judgement has a key and a preference in [1, 2], and this is {str(record)[:200]}")
    return record if still_an_answer(record.get("answer")) else None
