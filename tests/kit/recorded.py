"""Answers that a server once gave: recorded on their way to the kit, and given again on loopback.

    python -m kit.recorded http://127.0.0.1:8080 answers.jsonl

stands before a server, prints the address to use in its place, and appends each answer to the file, under a digest of
the request's body. Requests themselves are not kept.
"""

import gzip
import hashlib
import json
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx

from kit.chat_server import ChatServer, Reply, send

# Of all headers those that a client may act on.
_HEADERS = ("Content-Type", "Connection", "Keep-Alive", "Retry-After")


class Recorded:
    """Says to a `ChatServer` what to reply: the first recorded answer to the first such request, then the next.

    Attributes:
        unknown: what was asked that nobody recorded, shortened; they are answered with HTTP 404.
    """

    def __init__(self, *paths: Path):
        self.unknown: list[str] = []
        self._answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in paths:
            for line in gzip.decompress(path.read_bytes()).decode().splitlines():
                answer = json.loads(line)
                self._answers[answer["request"]].append(answer)

    def __call__(self, body: dict[str, Any], before: int) -> Reply:
        answers = self._answers.get(digest(body))
        if answers is None:
            asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
            self.unknown.append(str(asked)[:200])
            return send(f"no answer was recorded to {self.unknown[-1]}", 404)
        answer = answers[min(before, len(answers) - 1)]
        return send(answer["body"], answer["status"], **answer["headers"])


def digest(body: dict[str, Any]) -> str:
    """Of what a request asks, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def recording(upstream: str, path: Path) -> Callable[[dict[str, Any], int], Reply]:
    """Says to a `ChatServer` to reply what the server at `upstream` does, and writes it down."""
    client, lock = httpx.Client(timeout=None), threading.Lock()

    def choose(body: dict[str, Any], before: int) -> Reply:
        def reply(handler: BaseHTTPRequestHandler) -> None:
            key = {name: value for name, value in handler.headers.items() if name == "Authorization"}
            found = client.post(upstream + handler.path, json=body, headers=key)
            headers = {name: found.headers[name] for name in _HEADERS if name in found.headers}
            answer = {"request": digest(body), "status": found.status_code, "headers": headers, "body": found.text}
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            send(found.text, found.status_code, **headers)(handler)

        return reply

    return choose


if __name__ == "__main__":
    with ChatServer(recording(sys.argv[1], Path(sys.argv[2]))) as server:
        print(server.url, flush=True)
        threading.Event().wait()
