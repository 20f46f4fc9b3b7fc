"""How long to wait before a request is repeated, and requests that end with whoever asked for them."""

import random
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
from kit import chat_server
from kit.chat_server import ChatServer, send

from epsdpo.experiment.sections.server import Access
from epsdpo.models.api_key import ApiKey
from epsdpo.models.http import ask_server, backoff_seconds, retry_after_seconds


def test_waits():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after_seconds("1.5") == 1.5
    assert retry_after_seconds("-3") == 0.0
    assert retry_after_seconds("Thu, 01 Jan 2026 00:01:00 GMT", now) == 60.0
    assert retry_after_seconds("Wed, 31 Dec 2025 00:00:00 GMT", now) == 0.0
    assert retry_after_seconds("soon") is None and retry_after_seconds(None) is None
    generator = random.Random(0)
    waits = [[backoff_seconds(2.0, attempt, 30.0, generator) for _ in range(2000)] for attempt in (0, 2, 9)]
    assert np.mean(waits[0]) == pytest.approx(2.0, rel=0.05) and np.mean(waits[1]) == pytest.approx(8.0, rel=0.05)
    assert min(waits[0]) >= 1.0 and max(waits[1]) <= 12.0 and set(waits[2]) == {30.0}


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("1e999", float("inf")),
        ("9" * 400, float("inf")),
        ("-inf", 0.0),
        ("nan", None),
        ("0.25", 0.25),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Mon, 01 Jan 2024 99:99:99 GMT", None),
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", float("inf")),
        ("", None),
        ("\x00", None),
    ],
)
def test_how_long_to_wait(header, seconds):
    assert retry_after_seconds(header) == seconds


def asked(server, count, read=lambda body, number: (body, number), **changes):
    access = Access(base_url=server.url, backoff_seconds=0.01, **changes)
    return ask_server("/completions", access, ApiKey(), [{"number": number} for number in range(count)], read)


def test_every_request_comes_to_one_outcome():
    with ChatServer(lambda body, before: send(str(10 * body["number"]))) as server:
        outcomes = dict(asked(server, 30, concurrency=4))
        assert outcomes == {number: (10 * number, number) for number in range(30)}
        assert list(asked(server, 0)) == []
    assert len(server.bodies) == 30


def test_whoever_stops_taking_answers_stops_the_requests():
    """What hangs does not hold it up, and nothing goes on behind its back."""
    threads = threading.active_count()
    with ChatServer(lambda body, before: chat_server.hang if body["number"] == 1 else send("1")) as server:
        answers = asked(server, 1000, concurrency=3)
        for _ in range(5):
            next(answers)
        answers.close()
        requests = len(server.bodies)
        assert requests <= 5 + 3
        assert threading.active_count() <= threads + 1 + 3  # the server's own
        assert len(server.bodies) == requests


def test_what_reading_raises_ends_everything():
    def read(body, number):
        if number == 7:
            raise LookupError("no such thing")
        return body

    with ChatServer(lambda body, before: send("1")) as server:
        with pytest.raises(LookupError, match="no such thing"):
            list(asked(server, 1000, read, concurrency=2))
        assert len(server.bodies) < 20
