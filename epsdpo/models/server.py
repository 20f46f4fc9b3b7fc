"""Responses of a model behind an OpenAI-compatible server, such as `vllm serve` starts one."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from epsdpo.experiment import ConfigError
from epsdpo.experiment.sections.server import GenerationServer
from epsdpo.files import writable
from epsdpo.methods.chat_template import writes_date
from epsdpo.models.api_key import ApiKey
from epsdpo.models.http import ask_server, with_fields
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.response import Decoding, Failure, GenerationError, Response, own_seed
from epsdpo.models.server_answer import shortened, tokens_counted

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_SHOWN = 300

# Servers have defaults of their own for these, or take them from the model's generation_config, and would sample from
# a part of the distribution: llama.cpp's from the 40 likeliest tokens, without those below 5 % of the likeliest.
_WHOLE_DISTRIBUTION = {"top_k": -1, "min_p": 0.0}


class ServerEngine:
    """A server's model as an engine that answers prompts.

    A response comes as text. Its `token_ids` are the tokenizer's reading of it, with EOS behind a finished one, which
    may differ from the tokens that were sampled where a text has several.

    Raises:
        ConfigError: if the key's environment variable is not set, or holds what cannot be sent, or the server would
            write its own day into prompts.
    """

    def __init__(
        self,
        server: GenerationServer,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: Decoding,
        seed: int,
        made_by: dict[str, Any],
        section: str = "evaluate.server",
    ):
        """
        Args:
            model: its name on the server.
            made_by: with `served_by`.
            section: where a config states the server, for messages.
        """
        self.made_by = made_by
        self._server, self._model, self._tokenizer, self._section = server, model, tokenizer, section
        self._settings, self._seed = settings, seed
        self._key = ApiKey.from_environment(server.api_key_env, f"{section}.api_key_env")
        require_ids_for_dates(server, tokenizer, section)

    def answers(
        self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]
    ) -> Iterator[dict[int, Response | Failure]]:
        """Each as it comes.

        Raises:
            ConfigError: at once if a prompt brings tools, documents or settings that the server would have to render.
            GenerationError: at once for a failure that will not pass: a wrong key, an unknown model, another model than
                was asked for, another prompt than was sent, a context that ends before `max_new_tokens`.
        """
        if self._server.endpoint == "chat" and any(prompt.variables for prompt in prompts):
            brought = sorted({name for prompt in prompts for name in prompt.variables})
            raise ConfigError(
                f"{self._section}.endpoint is 'chat', but prompts bring {', '.join(brought)} for the chat template, "
                "and servers differ in what they make of that. Use endpoint: completions, which sends token ids"
            )
        wanted = [index for index, is_missing in enumerate(missing) if is_missing]
        bodies = [self._body(prompts[index]) for index in wanted]
        path = _PATHS[self._server.endpoint]

        def read(body: Any, number: int) -> Response | Failure:
            return self._read(body, prompts[wanted[number]])

        for number, outcome in ask_server(path, self._server, self._key, bodies, read):
            if isinstance(outcome, Failure) and outcome.status is not None and not outcome.transient:
                raise GenerationError(
                    f"{self._server.base_url} refuses the request for model {self._model!r} with {outcome}. Check "
                    f"{self._section}: base_url, the names of models and api_key_env, and that the server's context "
                    "holds prompt and response"
                )
            yield {wanted[number]: outcome}

    def _body(self, prompt: RenderedPrompt) -> dict[str, Any]:
        asks = {"messages": prompt.messages} if self._server.endpoint == "chat" else {"prompt": prompt.token_ids}
        body = {
            "model": self._model,
            **asks,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "max_tokens": self._settings.max_new_tokens,
            "seed": own_seed(prompt.token_ids, self._seed),
            **_WHOLE_DISTRIBUTION,
            **({"stop_token_ids": self._settings.stop_token_ids} if self._settings.stop_token_ids else {}),
        }
        return with_fields(body, self._server.extra_body)

    def _read(self, body: Any, prompt: RenderedPrompt) -> Response | Failure:
        try:
            body = writable(body)
            choice = body["choices"][0]
            text = choice["message"]["content"] if self._server.endpoint == "chat" else choice["text"]
            reason = choice["finish_reason"]
            counts = tokens_counted(body)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Failure("not an answer", shortened(body), transient=True)
        if not isinstance(text, str) or reason not in ("stop", "length") or (reason == "length" and not text):
            return Failure("not an answer", shortened(body), transient=True)
        # A server with one model answers whatever name it is asked for: policy and reference would be the same.
        served = body.get("model")
        if isinstance(served, str) and served != self._model:
            raise GenerationError(
                f"{self._server.base_url} was asked for model {self._model!r} and answers as {served!r}. If both are "
                f"one, name it so in {self._section} or give the server the other name; else start a server for it"
            )
        # A prompt of another length than ours: a server's own template, or a second BOS.
        if counts.get("prompt_tokens", len(prompt.token_ids)) != len(prompt.token_ids):
            raise GenerationError(
                f"{self._server.base_url} read a prompt of {counts['prompt_tokens']} tokens where training's rendering "
                f"has {len(prompt.token_ids)}: {prompt.text[:_SHOWN]!r}. Use {self._section}.endpoint: completions, or "
                "give the server the chat template that prepared the data, without a second BOS"
            )
        longest = self._settings.max_new_tokens
        if reason == "length" and counts.get("completion_tokens", longest) < longest:
            raise GenerationError(
                f"{self._server.base_url} cut a response to a prompt of {len(prompt.token_ids)} tokens after "
                f"{counts['completion_tokens']}, where max_new_tokens is {longest}. Start it with a context that holds "
                "both, for as many requests as it takes at once, or lower max_new_tokens"
            )
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        finished = reason == "stop"
        return Response(text, [*token_ids, self._tokenizer.eos_token_id] if finished else token_ids, finished)


def served_by(server: GenerationServer, model: str) -> dict[str, Any]:
    """What of a server belongs to `made_by`."""
    fields = with_fields(_WHOLE_DISTRIBUTION, server.extra_body)
    return {"server": server.base_url, "name": model, "endpoint": server.endpoint, "fields": fields}


def require_ids_for_dates(
    server: GenerationServer, tokenizer: PreTrainedTokenizerBase, section: str = "evaluate.server"
) -> None:
    """Refuse to leave to a server's clock what a chat template writes of the date.

    Raises:
        ConfigError: naming the endpoint that reads token ids.
    """
    if server.endpoint == "chat" and writes_date(tokenizer):
        raise ConfigError(
            f"{section}.endpoint is 'chat', but the chat template writes today's date: the server would write its own, "
            "and not the day that the model was trained with. Use endpoint: completions, which sends token ids"
        )
