"""An OpenAI-compatible server on loopback that serves a tiny model for real, and misbehaves where it is told to."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from epsdpo.experiment import EvaluateSection
from kit.tiny_generation import generate_responses, rendered, tiny_model


class Loopback:
    """What the server does and what was asked of it.

    Attributes:
        misbehave: gets the handler, the prompt's token ids and how often that prompt has come before. It returns False
            to have it answered, or writes what it likes and returns True.
        change: gets the answer's JSON before it is sent, to falsify it in place.
        asked: how often each prompt came.
        requests: the bodies.
        authorizations: the Authorization headers.
    """

    def __init__(self, tokenizer):
        self.misbehave = lambda handler, prompt, before: False
        self.change = lambda answer: None
        self.asked: Counter = Counter()
        self.requests: list[dict] = []
        self.authorizations: set[str | None] = set()
        self._tokenizer, self._model = tokenizer, tiny_model(tokenizer)
        self._lock = threading.Lock()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        chat = handler.path == "/v1/chat/completions"
        ids = rendered(self._tokenizer, body["messages"][-1]["content"]).token_ids if chat else body["prompt"]
        with self._lock:
            before = self.asked[tuple(ids)]
            self.asked[tuple(ids)] += 1
            self.requests.append(body)
            self.authorizations.add(handler.headers["Authorization"])
        if self.misbehave(handler, ids, before):
            return
        settings = EvaluateSection(temperature=body["temperature"], max_new_tokens=body["max_tokens"], batch_size=1)
        (response,) = generate_responses(self._model, self._tokenizer, [ids], settings, body["seed"])
        choice = {"message": {"role": "assistant", "content": response.text}} if chat else {"text": response.text}
        reason = "stop" if response.finished else "length"
        answer = {"choices": [{**choice, "finish_reason": reason}], "usage": {"prompt_tokens": len(ids)}}
        self.change(answer)
        send(handler, 200, json.dumps(answer).encode())


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes, **headers: str) -> bool:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(content)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)
    return True


def drip(handler: BaseHTTPRequestHandler, seconds: float) -> bool:
    """A byte now and then, each in time, of an answer that does not end."""
    handler.send_response(200)
    handler.end_headers()
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass  # the client has gone, as it should
    return True


def cut(handler: BaseHTTPRequestHandler) -> bool:
    """Less than was announced, and the connection closed."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"te')
    handler.close_connection = True
    return True


@contextmanager
def serving(loopback: Loopback):
    """The base URL while the server runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            loopback.handle(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
