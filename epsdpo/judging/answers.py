"""What a judge's answer means: log-probabilities, text or rewards in, P(the second output is better) or a failure out.

This module knows AlpacaEval's rule for log-probabilities, a strict one for text, Bradley and Terry's for rewards, and
the form of a chat completion. Nothing here guesses: what is not clearly an answer is a failure that keeps what came
back.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from epsdpo.judging.comparison import Answer, Failure

FIRST, SECOND = "m", "M"
Mode = Literal["logprobs", "text"]

# How tokenizers write the space before a word, where servers pass on the token as the vocabulary has it.
_SPACES = " \t\r\n\u2581\u0120"
_DECORATION = " \t\r\n\"'`*()[]."
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_DETAIL_CHARACTERS = 2000


def second_wins_by_logprobs(top: Iterable[tuple[str, float]]) -> float | None:
    """P(M) / (P(m) + P(M)) at the first token of the answer.

    AlpacaEval's preference for outputs in their own order, 2 - P(m)/(P(m)+P(M)), is 1 plus this. An identifier that is
    not among the tokens counts 0; None if neither is. Tokens that differ by surrounding space only are one answer.
    """
    mass = {FIRST: 0.0, SECOND: 0.0}
    tokens = [(token.strip(_SPACES), logprob) for token, logprob in top]
    found = [logprob for identifier, logprob in tokens if identifier in mass]
    if not found or max(found) == -math.inf:
        return None
    for identifier, logprob in tokens:
        if identifier in mass:
            mass[identifier] += math.exp(logprob - max(found))  # relative to the likelier: both may be far below e^-700
    return mass[SECOND] / (mass[FIRST] + mass[SECOND])


def second_wins_by_text(text: str) -> float | None:
    """1 for M, 0 for m, None for anything that is not the identifier alone.

    Quotes, emphasis, brackets and a full stop around it are allowed, and a closed <think> block before it.
    """
    answer = _THOUGHT.sub("", text, count=1) if text.lstrip().startswith("<think>") else text
    return {FIRST: 0.0, SECOND: 1.0}.get(answer.strip(_DECORATION))


def second_wins_by_rewards(first: float, second: float, temperature: float) -> float:
    """σ((second - first) / temperature): the Bradley-Terry chance that the second of two rewarded outputs is better."""
    return 0.5 * (1.0 + math.tanh(0.5 * (second - first) / temperature))


def read_completion(body: Any, mode: Mode) -> Answer | Failure:
    """The answer in a chat completion of an OpenAI-compatible server, parsed from its JSON."""
    try:
        choice = body["choices"][0]
        usage = tokens_counted(body)
        served = body.get("model") if isinstance(body.get("model"), str) else None
        found = _by_logprobs(choice) if mode == "logprobs" else _by_text(choice)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
        return Failure("not a chat completion", _shortened(body), transient=True)
    if isinstance(found, Failure):
        return found
    second_wins, evidence = found
    return Answer(second_wins, evidence, usage, served)


def tokens_counted(body: dict[str, Any]) -> dict[str, int]:
    """`prompt_tokens` and `completion_tokens` of a completion, as far as the server states them as counts."""
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return {
        name: counts[name]
        for name in ("prompt_tokens", "completion_tokens")
        if type(counts.get(name)) is int and counts[name] >= 0
    }


def _by_logprobs(choice: dict[str, Any]) -> tuple[float, dict[str, Any]] | Failure:
    logprobs = choice.get("logprobs")
    if not logprobs or not logprobs.get("content"):
        return Failure("no log-probabilities", _shortened(choice))
    top = [(entry["token"], float(entry["logprob"])) for entry in logprobs["content"][0]["top_logprobs"]]
    # A little above 0 is rounding; NaN fails the comparison as well.
    if not all(isinstance(token, str) and logprob <= 1.0e-3 for token, logprob in top):
        return Failure("impossible log-probabilities", _shortened(top))
    second_wins = second_wins_by_logprobs(top)
    if second_wins is None:
        return Failure("neither identifier among the likeliest tokens", _shortened(top))
    # JSON has no infinity: such a token says nothing more than one that is not there.
    return second_wins, {"top_logprobs": [[token, logprob] for token, logprob in top if logprob > -math.inf]}


def _by_text(choice: dict[str, Any]) -> tuple[float, dict[str, Any]] | Failure:
    text = choice["message"]["content"]
    if not isinstance(text, str):
        return Failure("no text", _shortened(choice))
    if choice.get("finish_reason") == "length":
        return Failure("answer cut at max_tokens", _shortened(text))
    second_wins = second_wins_by_text(text)
    if second_wins is None:
        return Failure("answer is no identifier", _shortened(text))
    return second_wins, {"text": text}


def _shortened(value: Any) -> str:
    return (value if isinstance(value, str) else repr(value))[:_DETAIL_CHARACTERS]
