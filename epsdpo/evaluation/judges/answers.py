"""What a judge's answer means: log-probabilities, text or rewards in, P(the second output is better) or a failure out.

AlpacaEval's rule for log-probabilities, a strict one for text, Bradley and Terry's for rewards. Nothing here guesses:
what is not clearly an answer is a failure that keeps what came back, and `remedies_for` says what may be done about it.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

from epsdpo.evaluation.judges.comparison import Answer
from epsdpo.models.response import Failure
from epsdpo.models.server_answer import shortened, tokens_counted

FIRST, SECOND = "m", "M"
Mode = Literal["logprobs", "text"]

# How tokenizers write the space before a word, where servers pass on the token as the vocabulary has it.
_SPACES = " \t\r\n\u2581\u0120"
_DECORATION = " \t\r\n\"'`*()[]."
_THOUGHT = re.compile(r"\s*<think>.*?</think>", re.DOTALL)

# With less on both identifiers together, the likelier answer is no identifier, and text mode would read a failure. What
# little the identifiers have then says nothing of the comparison: a judge that thinks first has e^-16 on them. In 298
# official answers it never is below 0.99.
SMALLEST_MASS = 0.5

NO_LOGPROBS = "no log-probabilities"
NEITHER = "neither identifier among the likeliest tokens"
IMPROBABLE = "the answer most likely begins with something else than an identifier"
NO_TEXT = "no text"
CUT = "answer cut at max_tokens"
NO_IDENTIFIER = "answer is no identifier"
NOT_FINITE = "not a finite number"

_THINKS = (
    "A judge that thinks before it answers needs mode: text (of a chat server) with a larger max_tokens, or its "
    "reasoning switched off: on a server by extra_body, such as {chat_template_kwargs: {enable_thinking: false}}, here "
    "by the chat template of a local copy. One that does not keep to the two identifiers may do so with a template of "
    "its own that has examples (evaluate.judge.template)"
)
_REMEDIES = {
    NO_LOGPROBS: "Use mode: text",
    **dict.fromkeys((NEITHER, IMPROBABLE, NO_TEXT, CUT, NO_IDENTIFIER), _THINKS),
    NOT_FINITE: "Use dtype: float32",
}


def remedies_for(reasons: Iterable[str]) -> list[str]:
    """What may be done about failures for these reasons, each remedy once."""
    return list(dict.fromkeys(_REMEDIES[reason] for reason in reasons if reason in _REMEDIES))


def second_wins_by_logprobs(top: Iterable[tuple[str, float]]) -> float | None:
    """P(M) / (P(m) + P(M)) at the first token of the answer.

    AlpacaEval's preference for outputs in their own order, 2 - P(m)/(P(m)+P(M)), is 1 plus this. An identifier that is
    not among the tokens counts 0; None if both together have less than `SMALLEST_MASS`. Tokens that differ by
    surrounding space only are one answer.
    """
    mass = {FIRST: 0.0, SECOND: 0.0}
    for token, logprob in top:
        if (identifier := token.strip(_SPACES)) in mass:
            mass[identifier] += math.exp(logprob)
    total = mass[FIRST] + mass[SECOND]
    return None if total < SMALLEST_MASS else mass[SECOND] / total


def read_logprobs(top: list[tuple[str, float]]) -> tuple[float, dict[str, Any]] | Failure:
    """P(M) / (P(m) + P(M)) and the evidence for it, or why there is none."""
    # A little above 0 is rounding; NaN fails the comparison as well.
    if not all(isinstance(token, str) and logprob <= 1.0e-3 for token, logprob in top):
        return Failure("impossible log-probabilities", shortened(top))
    second_wins = second_wins_by_logprobs(top)
    if second_wins is None:
        present = any(token.strip(_SPACES) in (FIRST, SECOND) for token, _ in top)
        return Failure(IMPROBABLE if present else NEITHER, shortened(top))
    # JSON has no infinity: such a token says nothing more than one that is not there.
    return second_wins, {"top_logprobs": [[token, logprob] for token, logprob in top if logprob > -math.inf]}


def still_an_answer(evidence: Any) -> bool:
    """Whether evidence that was stored as an answer's is one by today's rule for log-probabilities.

    Evidence of another kind or form is taken for what it was stored as, and so are identifiers other than m and M.

    Args:
        evidence: as `Answer.evidence` has it, or a choice of a chat completion, as AlpacaEval's package keeps it.
    """
    try:
        if evidence.get("top_logprobs"):
            top = [(str(token).strip(_SPACES), float(logprob)) for token, logprob in evidence["top_logprobs"]]
        else:
            entries = evidence["logprobs"]["content"][0]["top_logprobs"]
            top = [(str(entry["token"]).strip(_SPACES), float(entry["logprob"])) for entry in entries]
        found = any(token in (FIRST, SECOND) for token, _ in top)
        return not found or second_wins_by_logprobs(top) is not None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        return True


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
        return Failure("not a chat completion", shortened(body), transient=True)
    if isinstance(found, Failure):
        return found
    second_wins, evidence = found
    return Answer(second_wins, evidence, usage, served)


def _by_logprobs(choice: dict[str, Any]) -> tuple[float, dict[str, Any]] | Failure:
    logprobs = choice.get("logprobs")
    if not logprobs or not logprobs.get("content"):
        return Failure(NO_LOGPROBS, shortened(choice))
    first = logprobs["content"][0]["top_logprobs"]
    return read_logprobs([(entry["token"], float(entry["logprob"])) for entry in first])


def _by_text(choice: dict[str, Any]) -> tuple[float, dict[str, Any]] | Failure:
    text = choice["message"]["content"]
    if choice.get("finish_reason") == "length":  # before all else: thoughts that were cut leave some servers no text
        return Failure(CUT, shortened(choice if text is None else text))
    if not isinstance(text, str):
        return Failure(NO_TEXT, shortened(choice))
    second_wins = second_wins_by_text(text)
    if second_wins is None:
        return Failure(NO_IDENTIFIER, shortened(text))
    return second_wins, {"text": text}
