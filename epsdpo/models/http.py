"""An OpenAI-compatible server, asked many requests at once: what goes wrong is repeated, or counted as a failure."""

import dataclasses
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import anyio
import httpx
from anyio.abc import ObjectSendStream
from anyio.from_thread import start_blocking_portal

from epsdpo.experiment.sections.server import Access
from epsdpo.models.api_key import ApiKey
from epsdpo.models.response import Failure
from epsdpo.models.server_answer import CONNECTION_ERRORS, HEADERS, BadAnswer, ServerAnswer

logger = logging.getLogger(__name__)

_TRANSIENT = {408, 409, 425, 429, *range(500, 600)}

Found = TypeVar("Found")
Read = Callable[[Any, int], Found | Failure]


def ask_server(
    path: str, access: Access, key: ApiKey, bodies: Sequence[dict[str, Any]], read: Read
) -> Iterator[tuple[int, Found | Failure]]:
    """Number and outcome of each request, as they come; `access.concurrency` of them are under way at once.

    What a request that went out answers is not lost while the caller keeps what came before: no worker goes on before
    its last outcome was taken. Where the caller stops, so do the requests.

    Args:
        path: of the endpoint, behind `access.base_url`.
        bodies: of the requests, to be sent as JSON.
        read: what an answer's JSON means for the request of this number: what is found in it, or a failure, which is
            asked again where it is transient. What it raises ends everything.
    """
    send, receive = anyio.create_memory_object_stream[tuple[int, Found | Failure]]()
    # A notebook's thread has an event loop of its own under way, so the requests get one in another thread, which ends
    # with an interrupt of this one.
    with start_blocking_portal() as portal, receive:
        asking = portal.start_task_soon(_Asking(path, access, key, read).ask_all, bodies, send)
        while True:
            try:
                outcome = portal.call(receive.receive)
            except anyio.EndOfStream:
                break
            yield outcome
        asking.result()


class _Asking:
    """What the requests of one call share: the pause a server asked for, and what was told of it."""

    def __init__(self, path: str, access: Access, key: ApiKey, read: Read):
        self._url = access.base_url.rstrip("/") + path
        self._access, self._key, self._read = access, key, read
        self._random = random.Random()
        self._warned: set[str] = set()
        self._not_before = 0.0

    async def ask_all(self, bodies: Sequence[dict[str, Any]], send: ObjectSendStream) -> None:
        headers = {"Content-Type": "application/json", **HEADERS, **self._key.headers}
        workers = min(self._access.concurrency, len(bodies))
        limits = httpx.Limits(max_connections=workers)
        pending = enumerate(bodies)
        try:
            # A slow drip of bytes passes every timeout between two of them; `_post` limits the whole instead.
            async with (
                send,
                httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client,
                anyio.create_task_group() as tasks,
            ):
                for _ in range(workers):
                    tasks.start_soon(self._work, client, pending, send)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(
        self, client: httpx.AsyncClient, pending: Iterator[tuple[int, dict[str, Any]]], send: ObjectSendStream
    ) -> None:
        for number, body in pending:
            await send.send((number, await self._ask(client, number, json.dumps(body).encode("ascii"))))

    async def _ask(self, client: httpx.AsyncClient, number: int, content: bytes) -> Any:
        """One outcome, however often it takes to get it."""
        access = self._access
        for attempt in range(access.max_retries + 1):
            while (wait := self._not_before - time.monotonic()) > 0.0:
                await anyio.sleep(wait)
            outcome, retry_after = await self._post(client, number, content)
            if not isinstance(outcome, Failure) or not outcome.transient or attempt == access.max_retries:
                break
            self._warn_once(outcome)
            if retry_after is not None and retry_after > access.max_wait_seconds:
                detail = f"it asks to wait {retry_after:.0f} s, max_wait_seconds is {access.max_wait_seconds:g}"
                return dataclasses.replace(outcome, detail=f"{detail}; {outcome.detail}")
            if retry_after is not None:  # a rate limit concerns every request
                self._not_before = max(self._not_before, time.monotonic() + retry_after)
            await anyio.sleep(backoff_seconds(access.backoff_seconds, attempt, access.max_wait_seconds, self._random))
        return outcome

    async def _post(self, client: httpx.AsyncClient, number: int, content: bytes) -> tuple[Any, float | None]:
        """The outcome of one request, and the seconds that the server asks to wait before another."""
        try:
            with anyio.fail_after(self._access.timeout_seconds):
                async with client.stream("POST", self._url, content=content) as response:
                    answer = ServerAnswer(response, self._key)
                    async for part in response.aiter_raw():
                        answer.add(part)
            if answer.status == 200:
                return self._read(answer.json(), number), None
        except TimeoutError:
            return Failure("timeout", f"after {self._access.timeout_seconds:g} s", transient=True), None
        except CONNECTION_ERRORS as error:
            detail = self._key.hide(f"{type(error).__name__}: {error}")
            return Failure("connection failed", detail, transient=True), None
        except BadAnswer as problem:
            return Failure(problem.reason, problem.detail, transient=True), None
        status, said = answer.status, answer.text()
        if 300 <= status < 400:
            said = f"it points to {answer.redirection()}, which is not followed; check base_url. {said}"
        return Failure(f"HTTP {status}", said, status in _TRANSIENT, status), retry_after_seconds(answer.retry_after())

    def _warn_once(self, failure: Failure) -> None:
        """Tell of the first repetition for each reason: a server that is not there must not look like a slow one."""
        if failure.reason not in self._warned:
            self._warned.add(failure.reason)
            logger.warning("%s (%s): repeated after a wait", failure.reason, failure.detail[:200])


def with_fields(body: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A request's body with a config's `extra_body` on top, of which null takes a field out."""
    return {name: value for name, value in (body | extra).items() if value is not None}


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, given as such or as a date; None if it says neither.

    They are infinite where it asks for a moment that no clock here can tell.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def backoff_seconds(base: float, attempt: int, longest: float, generator: random.Random) -> float:
    """Wait after attempt 0, 1, …: base · 2^attempt on average, at most `longest`.

    It is drawn between half and one and a half of that, so that requests refused together do not come back together.
    """
    return min(longest, base * 2.0**attempt * generator.uniform(0.5, 1.5))
