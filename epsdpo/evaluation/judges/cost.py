"""What judging will cost, before the first request, and what it did cost, after the last.

Tokens before the first request are an approximation from bytes, since the judge's tokenizer is not known here;
afterwards they are what the server says.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from epsdpo.experiment.sections.judge import JudgeSection

_BYTES_PER_TOKEN = 4.0  # of English; other languages take up to twice as many tokens
_SECONDS_PER_REQUEST = 2.0


@dataclass(frozen=True)
class Estimate:
    """Expected, not measured.

    Attributes:
        requests: how many are sent, repetitions left out.
        prompt_tokens: of all together.
        completion_tokens: at most, of all together.
        seconds: if each request takes two.
        cost: in the currency of the prices; None without prices.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    cost: float | None


def estimate(bodies: list[dict[str, Any]], settings: JudgeSection) -> Estimate:
    """What it takes to send these request bodies."""
    contents = (message["content"] for body in bodies for message in body["messages"])
    prompt_tokens = math.ceil(sum(len(text.encode("utf-8", "replace")) for text in contents) / _BYTES_PER_TOKEN)
    completion_tokens = len(bodies) * (1 if settings.mode == "logprobs" else settings.max_tokens)
    return Estimate(
        requests=len(bodies),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        seconds=len(bodies) * _SECONDS_PER_REQUEST / settings.concurrency,
        cost=cost_of(prompt_tokens, completion_tokens, settings),
    )


def estimate_text(expected: Estimate) -> str:
    """The estimate in a sentence."""
    money = "no prices given" if expected.cost is None else f"about {expected.cost:.2f} in the currency of the prices"
    return (
        f"{expected.requests} requests, about {expected.prompt_tokens:,} prompt tokens and at most "
        f"{expected.completion_tokens:,} completion tokens, {money}, about {expected.seconds / 60.0:.1f} min at "
        f"{_SECONDS_PER_REQUEST:g} s per request"
    )


def tokens_used(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """prompt_tokens and completion_tokens of stored answers, as servers counted them; 0 where none did."""
    totals = {"prompt_tokens": 0, "completion_tokens": 0}
    for record in records:
        for name in totals:
            totals[name] += record["usage"].get(name, 0)
    return totals


def cost_of(prompt_tokens: int, completion_tokens: int, settings: JudgeSection) -> float | None:
    """Price of so many tokens; None without prices."""
    if settings.input_price is None or settings.output_price is None:
        return None
    return (prompt_tokens * settings.input_price + completion_tokens * settings.output_price) / 1.0e6
