"""A judge behind an OpenAI-compatible chat server, asked many requests at once.

This module knows HTTP: what to send, what is worth repeating and when to give up. Reading what comes back is left to
`epsdpo.models.server_answer`, what it means to `epsdpo.evaluation.judges.answers`, how long to wait to
`epsdpo.models.http`, prices to `epsdpo.evaluation.judges.cost`.
"""

import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
from anyio.from_thread import start_blocking_portal

from epsdpo.evaluation.judges.answers import read_completion, remedies_for
from epsdpo.evaluation.judges.comparison import Answer, Deliver, Failure, JudgeError, Presentation
from epsdpo.evaluation.judges.cost import estimate, estimate_text
from epsdpo.evaluation.judges.template import load_template
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.errors import ConfigError
from epsdpo.models.api_key import ApiKey
from epsdpo.models.http import backoff_seconds
from epsdpo.models.server_answer import CONNECTION_ERRORS, HEADERS, BadAnswer, ServerAnswer

logger = logging.getLogger(__name__)

# What is wrong with these is wrong with every request. The key is never part of a message.
_REFUSALS = {
    401: "The server does not accept the key. Check the variable that evaluate.judge.api_key_env names",
    402: "The server asks for payment. Check the account behind the key",
    403: "The key may not use this model. Check evaluate.judge.model and what the account may do",
    404: "Check evaluate.judge.model and base_url, which ends before /chat/completions, mostly with /v1",
}
_TRANSIENT = {408, 409, 425, 429, *range(500, 600)}
_GIVE_UP_AFTER = 20


class ChatJudge:
    """Asks a chat server for m or M, with the key that the environment holds when it is made."""

    def __init__(self, settings: JudgeSection):
        """
        Raises:
            JudgeError: if the environment variable with the key is not set, or holds what cannot be sent.
            ValueError, OSError: if the template cannot be used.
        """
        self.name, self.order = settings.model, settings.order
        self._settings = settings
        self._template = load_template(settings.template)
        self._url = settings.base_url.rstrip("/") + "/chat/completions"
        try:
            self._key = ApiKey.from_environment(settings.api_key_env, "evaluate.judge.api_key_env")
        except ConfigError as error:
            raise JudgeError(str(error)) from error
        self._random = random.Random()

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
        body = {name: value for name, value in (body | settings.extra_body).items() if value is not None}
        return {"judge": "chat", "mode": settings.mode, "body": body}

    def answer(self, presentations: list[Presentation], deliver: Deliver) -> None:
        """Ask about all; see `Judge`. An estimate of time and cost is logged first.

        Raises:
            JudgeError: if the server refuses in a way that concerns every request, or the first 20 all fail.
        """
        settings = self._settings
        expected = estimate([self.request(presentation)["body"] for presentation in presentations], settings)
        logger.info("%s at %s: %s", self.name, self._url, estimate_text(expected))
        # A notebook's thread has an event loop of its own under way, so the requests get one in another thread, which
        # ends with an interrupt of this one.
        with start_blocking_portal() as portal:
            portal.call(self._answer_all, presentations, deliver)

    async def _answer_all(self, presentations: list[Presentation], deliver: Deliver) -> None:
        run = _Run(enumerate(presentations), deliver)
        headers = {"Content-Type": "application/json", **HEADERS, **self._key.headers}
        workers = min(self._settings.concurrency, len(presentations))
        limits = httpx.Limits(max_connections=workers)
        try:
            # A slow drip of bytes passes every timeout between two of them; `_post` limits the whole instead.
            async with (
                httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client,
                anyio.create_task_group() as tasks,
            ):
                for _ in range(workers):
                    tasks.start_soon(self._work, client, run)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, client: httpx.AsyncClient, run: "_Run") -> None:
        for number, presentation in run.pending:
            run.finish(number, await self._ask(client, presentation, run))

    async def _ask(self, client: httpx.AsyncClient, presentation: Presentation, run: "_Run") -> Answer | Failure:
        """One answer, however often it takes to get it."""
        settings = self._settings
        content = json.dumps(self.request(presentation)["body"]).encode("ascii")
        for attempt in range(settings.max_retries + 1):
            await run.permission()
            outcome, retry_after = await self._post(client, content, any_answer=run.answers > 0)
            if isinstance(outcome, Answer) or not outcome.transient or attempt == settings.max_retries:
                break
            run.warn_once(outcome)
            if retry_after is not None and retry_after > settings.max_wait_seconds:
                detail = f"it asks to wait {retry_after:.0f} s, max_wait_seconds is {settings.max_wait_seconds:g}"
                return Failure(outcome.reason, f"{detail}; {outcome.detail}")
            if retry_after is not None:
                run.pause(retry_after)  # a rate limit concerns every request
            await anyio.sleep(
                backoff_seconds(settings.backoff_seconds, attempt, settings.max_wait_seconds, self._random)
            )
        return outcome

    async def _post(
        self, client: httpx.AsyncClient, content: bytes, any_answer: bool
    ) -> tuple[Answer | Failure, float | None]:
        """The outcome of one request, and the seconds that the server asks to wait before another."""
        try:
            with anyio.fail_after(self._settings.timeout_seconds):
                async with client.stream("POST", self._url, content=content) as response:
                    answer = ServerAnswer(response, self._key)
                    async for part in response.aiter_raw():
                        answer.add(part)
            if answer.status == 200:
                return read_completion(answer.json(), self._settings.mode), None
        except TimeoutError:
            return Failure("timeout", f"after {self._settings.timeout_seconds:g} s", transient=True), None
        except CONNECTION_ERRORS as error:
            detail = self._key.hide(f"{type(error).__name__}: {error}")
            return Failure("connection failed", detail, transient=True), None
        except BadAnswer as problem:
            return Failure(problem.reason, problem.detail, transient=True), None
        status, said = answer.status, answer.text()
        if status in _REFUSALS and not any_answer:
            raise JudgeError(f"{self._url} answers {status}: {said[:300]!r}. {_REFUSALS[status]}")
        if 300 <= status < 400:
            said = f"it points to {answer.redirection()}, which is not followed; check evaluate.judge.base_url. {said}"
        return Failure(f"HTTP {status}", said, transient=status in _TRANSIENT), answer.retry_after()


class _Run:
    """What the workers of one call share: the work left, the pause a server asked for, how it went so far."""

    def __init__(self, pending: Iterator[tuple[int, Presentation]], deliver: Deliver):
        self.pending = pending
        self.answers = 0
        self._deliver = deliver
        self._failures: Counter[str] = Counter()
        self._warned: set[str] = set()
        self._not_before = 0.0

    def pause(self, seconds: float) -> None:
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    async def permission(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0.0:
            await anyio.sleep(wait)

    def warn_once(self, failure: Failure) -> None:
        """Tell of the first repetition for each reason: a server that is not there must not look like a slow one."""
        if failure.reason not in self._warned:
            self._warned.add(failure.reason)
            logger.warning("%s (%s): repeated after a wait", failure.reason, failure.detail[:200])

    def finish(self, number: int, outcome: Answer | Failure) -> None:
        """Hand over an outcome.

        Raises:
            JudgeError: if nothing but failures has come for so long that more of them would only cost.
        """
        self._deliver(number, outcome)
        if isinstance(outcome, Answer):
            self.answers += 1
            return
        self._failures[outcome.reason] += 1
        if self.answers == 0 and self._failures.total() >= _GIVE_UP_AFTER:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self._failures.most_common())
            remedies = "".join(f"{text}. " for text in remedies_for(self._failures))
            raise JudgeError(
                f"the first {_GIVE_UP_AFTER} requests all failed: {reasons}; the last said {outcome.detail[:300]!r}. "
                f"{remedies}failures.jsonl has what came back"
            )
