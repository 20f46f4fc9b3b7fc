"""Responses of a model behind an OpenAI-compatible server.

This module knows the two endpoints, what an answer of theirs must hold, and which failures pass. Reading an answer is
left to `epsdpo.models.server_answer`, what is asked and what is kept to others.
"""

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from epsdpo.data.rendering import RenderedPrompt
from epsdpo.evaluation.judges.answers import tokens_counted
from epsdpo.experiment import ConfigError, EvaluateSection, ServerSection
from epsdpo.files import writable
from epsdpo.methods.chat_template import writes_date
from epsdpo.models.api_key import ApiKey
from epsdpo.models.response import GenerationError, Response, own_seed
from epsdpo.models.server_answer import CONNECTION_ERRORS, HEADERS, BadAnswer, ServerAnswer

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
    """A server's model as an engine for `epsdpo.models.respond`: `batch_size` requests at a time.

    A response comes as text. Its `token_ids` are the tokenizer's reading of it, with EOS behind a finished one, which
    may differ from the tokens that were sampled where a text has several.

    Raises:
        ConfigError: if the key's environment variable is not set, or holds what cannot be sent, or the server would
            write its own day into prompts.
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
        self._key = ApiKey.from_environment(server.api_key_env, "evaluate.server.api_key_env")
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
        headers = {"Content-Type": "application/json", **HEADERS, **self._key.headers}
        failures: dict[int, str] = {}
        self._stopped.clear()
        # The client outlives the requests: one that is closed under them leaves them to wait until their time is up.
        with httpx.Client(headers=headers, timeout=self._server.timeout) as client:
            pool = ThreadPoolExecutor(self._settings.batch_size)
            try:
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

    def _post(self, client: httpx.Client, prompt: RenderedPrompt) -> ServerAnswer:
        """A complete answer with status 200."""
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
        content = json.dumps(body).encode("ascii")
        deadline = time.monotonic() + self._server.timeout
        try:
            with client.stream("POST", self._server.base_url.rstrip("/") + path, content=content) as response:
                answer = ServerAnswer(response, self._key)
                # The client's own time limit starts anew with every byte; a server may drip for ever.
                for part in response.iter_raw():
                    answer.add(part)
                    if time.monotonic() > deadline:
                        raise _PassingError(f"no complete answer within {self._server.timeout:g} s")
        except CONNECTION_ERRORS as error:
            raise _PassingError(self._key.hide(f"{type(error).__name__}: {error}")) from None
        except BadAnswer as problem:
            raise _PassingError(str(problem)[:_SHOWN]) from problem
        if answer.status == 200:
            return answer
        message = f"status {answer.status}: {answer.text()[:_SHOWN]}"
        if answer.status in _PASSING or answer.status >= 500:
            raise _PassingError(message, answer.retry_after())
        if 300 <= answer.status < 400:
            message += f" (it points to {answer.redirection()}, which is not followed)"
        raise GenerationError(
            f"{self._server.base_url} refuses the request for model {self._model!r} with {message}. Check "
            "evaluate.server: base_url, the models' names and api_key_env"
        )

    def _read(self, answer: ServerAnswer, prompt: RenderedPrompt) -> Response:
        try:
            body = writable(answer.json())
            choice = body["choices"][0]
            text = choice["message"]["content"] if self._server.endpoint == "chat" else choice["text"]
            reason = choice["finish_reason"]
            if not isinstance(text, str) or reason not in ("stop", "length") or (reason == "length" and not text):
                raise ValueError(f"text {text!r:.40}, finish_reason {reason!r:.40}")
        except BadAnswer as problem:
            raise _PassingError(str(problem)[:_SHOWN]) from problem
        except (ValueError, KeyError, IndexError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise _PassingError(f"not an answer ({said}): {answer.text()[:_SHOWN]}") from error
        self._check_rendering(body, prompt)
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        finished = reason == "stop"
        return Response(text, [*token_ids, self._tokenizer.eos_token_id] if finished else token_ids, finished)

    def _check_rendering(self, body: dict[str, Any], prompt: RenderedPrompt) -> None:
        """Refuse an answer to a prompt of another length than ours: a server's own template, or a second BOS."""
        counted, sent = tokens_counted(body).get("prompt_tokens"), len(prompt.token_ids)
        if counted is not None and counted != sent:
            raise GenerationError(
                f"{self._server.base_url} read a prompt of {counted} tokens where training's rendering has {sent}: "
                f"{prompt.text[:_SHOWN]!r}. Use evaluate.server.endpoint: completions, or give the server the chat "
                "template that prepared the data, without a second BOS"
            )


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
