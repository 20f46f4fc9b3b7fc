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
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from kit.chat_server import ChatServer, Reply, send

# Of all headers those that a client may act on.
_HEADERS = ("Content-Type", "Connection", "Keep-Alive", "Retry-After")


class Recorded:
    """Says to a `ChatServer` what to reply: the first recorded answer to the first such request, then the next.

    Attributes:
        unknown: requests that nobody recorded, shortened; they are answered with HTTP 501.
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
            self.unknown.append(json.dumps(body)[:300])
            return send(f"no answer was recorded to {self.unknown[-1]}", 501)
        answer = answers[min(before, len(answers) - 1)]
        return send(answer["body"], answer["status"], **answer["headers"])


def digest(body: dict[str, Any]) -> str:
    """Of what a request asks, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def recording(upstream: str, path: Path):
    """Says to a `ChatServer` to reply what the server at `upstream` does, and writes it down."""
    lock = threading.Lock()

    def choose(body: dict[str, Any], before: int) -> Reply:
        def reply(handler) -> None:
            headers = {"Content-Type": "application/json"}
            if "Authorization" in handler.headers:
                headers["Authorization"] = handler.headers["Authorization"]
            request = urllib.request.Request(upstream + handler.path, json.dumps(body).encode(), headers)
            try:
                with urllib.request.urlopen(request) as response:
                    status, found, text = response.status, response.headers, response.read().decode()
            except urllib.error.HTTPError as error:
                status, found, text = error.code, error.headers, error.read().decode()
            kept = {name: found[name] for name in _HEADERS if name in found}
            answer = {"request": digest(body), "status": status, "headers": kept, "body": text}
            with lock, path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")
            send(text, status, **kept)(handler)

        return reply

    return choose


if __name__ == "__main__":
    with ChatServer(recording(sys.argv[1], Path(sys.argv[2]))) as server:
        print(server.url, flush=True)
        threading.Event().wait()
