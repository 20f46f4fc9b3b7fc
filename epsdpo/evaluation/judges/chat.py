"""A judge behind an OpenAI-compatible chat server."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from epsdpo.evaluation.judges.answers import read_completion, remedies_for
from epsdpo.evaluation.judges.comparison import Answer, JudgeError, Presentation
from epsdpo.evaluation.judges.cost import estimate, estimate_text
from epsdpo.evaluation.judges.template import load_template
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.models.api_key import ApiKey
from epsdpo.models.http import ask_server, with_fields
from epsdpo.models.response import Failure

logger = logging.getLogger(__name__)

# What is wrong with these is wrong with every request. The key is never part of a message.
_REFUSALS = {
    401: "The server does not accept the key. Check the variable that evaluate.judge.api_key_env names",
    402: "The server asks for payment. Check the account behind the key",
    403: "The key may not use this model. Check evaluate.judge.model and what the account may do",
    404: "Check evaluate.judge.model and base_url, which ends before /chat/completions, mostly with /v1",
}
_GIVE_UP_AFTER = 20


class ChatJudge:
    """Asks a chat server for m or M, with the key that the environment holds when it is made."""

    def __init__(self, settings: JudgeSection):
        """
        Raises:
            ConfigError: if the environment variable with the key is not set, or holds what cannot be sent.
            ValueError, OSError: if the template cannot be used.
        """
        self.name, self.order = settings.model, settings.order
        self._settings = settings
        self._template = load_template(settings.template)
        self._key = ApiKey.from_environment(settings.api_key_env, "evaluate.judge.api_key_env")

    def request(self, presentation: Presentation) -> dict[str, Any]:
        """The body of the HTTP request, with the mode in which its answer is read; the server's address is no part."""
        settings = self._settings
        body = {
            "model": settings.model,
            "messages": self._template.fill(presentation),
            "temperature": settings.temperature,
        }
        if settings.mode == "logprobs":
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": settings.top_logprobs}
        else:
            body |= {"max_tokens": settings.max_tokens}
        return {"judge": "chat", "mode": settings.mode, "body": with_fields(body, settings.extra_body)}

    def answers(
        self, presentations: Sequence[Presentation], missing: Sequence[bool]
    ) -> Iterator[dict[int, Answer | Failure]]:
        """Each as it comes; see `Judge`. An estimate of time and cost is logged first.

        Raises:
            JudgeError: if the server refuses in a way that concerns every request, or the first 20 all fail.
        """
        settings = self._settings
        wanted = [index for index, is_missing in enumerate(missing) if is_missing]
        bodies = [self.request(presentations[index])["body"] for index in wanted]
        logger.info("%s at %s: %s", self.name, settings.base_url, estimate_text(estimate(bodies, settings)))
        answered, failures = False, Counter()

        def read(body: Any, number: int) -> Answer | Failure:
            return read_completion(body, settings.mode)

        for number, outcome in ask_server("/chat/completions", settings, self._key, bodies, read):
            if not answered and isinstance(outcome, Failure) and outcome.status in _REFUSALS:
                raise JudgeError(f"{settings.base_url} answers with {outcome}. {_REFUSALS[outcome.status]}")
            yield {wanted[number]: outcome}
            answered = answered or isinstance(outcome, Answer)
            if isinstance(outcome, Failure):
                failures[outcome.reason] += 1
            if not answered and failures.total() >= _GIVE_UP_AFTER:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in failures.most_common())
                remedies = "".join(f"{text}. " for text in remedies_for(failures))
                raise JudgeError(
                    f"the first {_GIVE_UP_AFTER} requests all failed: {reasons}; the last said "
                    f"{outcome.detail[:300]!r}. {remedies}failures.jsonl has what came back"
                )
