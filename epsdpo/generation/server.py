"""Responses of a model behind an OpenAI-compatible server.

This module knows the two endpoints, what an answer of theirs must hold, and which failures pass. What is asked and what
is kept is left to others.
"""

import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from epsdpo.chat_template import writes_date
from epsdpo.experiment import ConfigError, EvaluateSection, ServerSection
from epsdpo.generation.rendering import RenderedPrompt
from epsdpo.generation.response import GenerationError, Response, own_seed
from epsdpo.texts import writable

_LONGEST_BACKOFF = 60.0
_SHOWN = 300
# Beside these, every answer but 200 is a mistake that would come back as it is.
_PASSING = {408, 409, 425, 429}


class _PassingError(Exception):
    """A failure that another attempt may not meet; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class ServerEngine:
    """A server's model as an engine for `epsdpo.generation.respond`: `batch_size` requests at a time.

    A response comes as text. Its `token_ids` are the tokenizer's reading of it, with EOS behind a finished one, which
    may differ from the tokens that were sampled where a text has several.

    Raises:
        ConfigError: if the key's environment variable is not set, or the server would write its own day into prompts.
    """

    def __init__(
        self,
        server: ServerSection,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: EvaluateSection,
        seed: int,
        made_by: dict[str, Any],
    ):
        self.made_by = made_by
        self._server, self._model, self._tokenizer = server, model, tokenizer
        self._settings, self._seed = settings, seed
        self._key = _key(server.api_key_env)
        require_ids_for_dates(server, tokenizer)
        self._stopped = threading.Event()

    def answers(self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]) -> Iterator[dict[int, Response]]:
        """Each as it comes.

        Raises:
            ConfigError: at once if a prompt brings tools, documents or settings that the server would have to render.
            GenerationError: at once for a failure that will not pass (a wrong key, an unknown model); after all other
                prompts were answered, for prompts that failed in every attempt.
        """
        if self._server.endpoint == "chat" and any(prompt.variables for prompt in prompts):
            brought = sorted({name for prompt in prompts for name in prompt.variables})
            raise ConfigError(
                f"evaluate.server.endpoint is 'chat', but prompts bring {', '.join(brought)} for the chat template, "
                "and servers differ in what they make of that. Use endpoint: completions, which sends token ids"
            )
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        failures: dict[int, str] = {}
        self._stopped.clear()
        pool = ThreadPoolExecutor(self._settings.batch_size)
        try:
            with httpx.Client(headers=headers, timeout=self._server.timeout) as client:
                asked = {
                    pool.submit(self._answer, client, prompt): index
                    for index, prompt in enumerate(prompts)
                    if missing[index]
                }
                for future in as_completed(asked):
                    try:
                        yield {asked[future]: future.result()}
                    except _PassingError as error:
                        failures[asked[future]] = str(error)
        finally:
            self._stopped.set()  # nobody is to wait for another attempt any more
            pool.shutdown(cancel_futures=True)
        if failures:
            raise GenerationError(
                f"{self._server.base_url}: {len(failures)} of {sum(missing)} prompts failed in each of "
                f"{self._server.attempts} attempts, the first because of: {failures[min(failures)]}. The others are "
                "kept; run the same again to ask these again"
            )

    def _answer(self, client: httpx.Client, prompt: RenderedPrompt) -> Response:
        """The answer to one prompt, after as many attempts as it takes and may."""
        for attempt in itertools.count(1):
            try:
                return self._read(self._post(client, prompt), prompt)
            except _PassingError as error:
                if attempt == self._server.attempts:
                    raise
                # Half of the wait is chance, so that requests that failed together do not come back together.
                backoff = self._server.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
                wait = min(backoff, _LONGEST_BACKOFF) if error.wait is None else min(error.wait, self._server.timeout)
                if self._stopped.wait(wait):
                    raise

    def _post(self, client: httpx.Client, prompt: RenderedPrompt) -> bytes:
        """The body of a complete answer with status 200."""
        path = "/chat/completions" if self._server.endpoint == "chat" else "/completions"
        asks = {"messages": prompt.messages} if self._server.endpoint == "chat" else {"prompt": prompt.token_ids}
        body = {
            "model": self._model,
            **asks,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "max_tokens": self._settings.max_new_tokens,
            "seed": own_seed(prompt.token_ids, self._seed),
        }
        if self._settings.stop_token_ids:
            body["stop_token_ids"] = self._settings.stop_token_ids
        deadline = time.monotonic() + self._server.timeout
        try:
            with client.stream("POST", self._server.base_url.rstrip("/") + path, json=body) as answer:
                content = bytearray()
                # The client's own time limit starts anew with every byte; a server may drip for ever.
                for part in answer.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise _PassingError(f"no complete answer within {self._server.timeout:g} s")
        except httpx.RequestError as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        if answer.status_code == 200:
            return bytes(content)
        said = self._without_key(content.decode(errors="replace")[:_SHOWN])
        message = f"status {answer.status_code}: {said}"
        if answer.status_code in _PASSING or answer.status_code >= 500:
            raise _PassingError(message, _retry_after(answer.headers))
        raise GenerationError(
            f"{self._server.base_url} refuses the request for model {self._model!r} with {message}. Check "
            "evaluate.server: base_url, the models' names and api_key_env"
        )

    def _read(self, content: bytes, prompt: RenderedPrompt) -> Response:
        try:
            answer = writable(json.loads(content))
            choice = answer["choices"][0]
            text = choice["message"]["content"] if self._server.endpoint == "chat" else choice["text"]
            reason = choice["finish_reason"]
            if not isinstance(text, str) or reason not in ("stop", "length") or (reason == "length" and not text):
                raise ValueError(f"text {text!r:.40}, finish_reason {reason!r}")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            said = self._without_key(content.decode(errors="replace")[:_SHOWN])
            raise _PassingError(f"not an answer ({type(error).__name__}: {error}): {said}") from error
        self._check_rendering(answer, prompt)
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        finished = reason == "stop"
        return Response(text, [*token_ids, self._tokenizer.eos_token_id] if finished else token_ids, finished)

    def _check_rendering(self, answer: dict[str, Any], prompt: RenderedPrompt) -> None:
        """Refuse an answer to a prompt of another length than ours: a server's own template, or a second BOS."""
        usage = answer.get("usage") or {}
        counted, sent = usage.get("prompt_tokens"), len(prompt.token_ids)
        if counted is not None and counted != sent:
            raise GenerationError(
                f"{self._server.base_url} read a prompt of {counted} tokens where training's rendering has {sent}: "
                f"{prompt.text[:_SHOWN]!r}. Use evaluate.server.endpoint: completions, or give the server the chat "
                "template that prepared the data, without a second BOS"
            )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "…") if self._key else text


def require_ids_for_dates(server: ServerSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to leave to a server's clock what a chat template writes of the date.

    Raises:
        ConfigError: naming the endpoint that reads token ids.
    """
    if server.endpoint == "chat" and writes_date(tokenizer):
        raise ConfigError(
            "evaluate.server.endpoint is 'chat', but the chat template writes today's date: the server would write its "
            "own, and not the day that the model was trained with. Use endpoint: completions, which sends token ids"
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"evaluate.server.api_key_env names {variable}, which is not set. Set it in the environment, or remove the "
            "key from the config if the server needs none"
        )
    return key


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that the server asks to wait; a date, which is the other form that HTTP permits, is not used."""
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None
