"""A chat server on loopback for tests: it answers as it is told, well or badly, and remembers what it was asked."""

import contextlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["_Handler"], None]

_OUTPUTS = re.compile(r'<answer identifier="[mM]">\n(.*?)\n</answer>', re.DOTALL)


class ChatServer:
    """Serves until its `with` block ends.

    Attributes:
        choose: given a request's body and how often the same one came before, says how to reply.
        bodies, headers: of each request, in the order of arrival; `times` when it came.
        url: the base_url of a judge.
    """

    def __init__(self, choose: Callable[[dict[str, Any], int], Reply]):
        self.choose = choose
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()  # ends replies that would never end
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.owner = self
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            before = server.bodies.count(body)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
        with contextlib.suppress(ConnectionError):
            server.choose(body, before)(self)

    def log_message(self, *arguments: Any) -> None:
        """Tests need no access log."""


def outputs(body: dict[str, Any]) -> tuple[str, str]:
    """The first and the second output of a request with the default template."""
    first, second = _OUTPUTS.findall(body["messages"][-1]["content"])
    return first, second


def send(text: str | bytes, status: int = 200, **headers: str) -> Reply:
    def reply(handler: _Handler) -> None:
        content = text.encode() if isinstance(text, str) else text
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def completion(text: str = "m", top: list[tuple[str, float]] | None = None, finish: str = "stop", **more: Any) -> Reply:
    """A chat completion; `top` are the log-probabilities at its first token."""
    logprobs = (
        {"content": [{"token": text, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]} if top else None
    )
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "logprobs": logprobs,
        "finish_reason": finish,
    }
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return send(json.dumps({"model": "judge-2026", "choices": [choice], "usage": usage, **more}))


def cut(text: str, length: int) -> Reply:
    """Promise the whole text, send the beginning, close."""

    def reply(handler: _Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text[:length].encode())
        handler.close_connection = True

    return reply


def reset(handler: _Handler) -> None:
    """Break the connection off as a crashed server does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def hang(handler: _Handler) -> None:
    """Say nothing until the server ends."""
    handler.server.owner.closing.wait()
    handler.close_connection = True


def drip(handler: _Handler) -> None:
    """A byte now and then, so that no timeout between two of them ever passes."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in _until(handler.server.owner.closing, seconds=0.02):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def _until(event: threading.Event, seconds: float) -> Iterator[None]:
    while not event.wait(seconds):
        yield
