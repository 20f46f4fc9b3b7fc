"""How an OpenAI-compatible server is reached and asked: the same keys wherever a config names one.

They decide how soon and at what price an answer comes, and not what it says.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from epsdpo.experiment.sections.base import PositiveInt, Section


class Access(Section):
    """A server that is asked many requests at once."""

    # A mistaken address may hold a password, so that mistakes are reported without their values.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str | None = Field(
        None, description="Address of the server up to and with /v1, e.g. http://localhost:8000/v1. [K]"
    )
    api_key_env: str | None = Field(
        None, description="Environment variable that holds the server's key; null sends none. [K]"
    )
    concurrency: PositiveInt = Field(8, description="Requests under way at once. [K]")
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        120.0, description="Longest time for one request, from its start to the last byte of the answer. [K]"
    )
    max_retries: Annotated[int, Field(ge=0)] = Field(
        6, description="How often a request is repeated after a rate limit, a server error or a lost connection. [K]"
    )
    backoff_seconds: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Mean wait before the first repetition; it doubles with each, and is drawn at random. [K]"
    )
    max_wait_seconds: Annotated[float, Field(gt=0)] = Field(
        120.0, description="Longest wait before a repetition; where Retry-After asks for more, the request fails. [K]"
    )

    @model_validator(mode="after")
    def _address_is_one(self) -> Access:
        if self.base_url is not None:
            check_address(self.base_url)
        return self


ACCESS = tuple(Access.model_fields)


class GenerationServer(Access):
    """A server that answers prompts, such as `vllm serve` starts one."""

    base_url: str = Field(description="Where its API begins, up to and with /v1, e.g. http://localhost:8000/v1. [K]")
    endpoint: Literal["completions", "chat"] = Field(
        "completions",
        description="'completions' sends the prompt's token ids, so that it is read as in training; 'chat' sends "
        "messages, which the server renders itself. [K]",
    )
    concurrency: PositiveInt = Field(64, description="Requests under way at once. [K]")
    timeout_seconds: Annotated[float, Field(gt=0)] = Field(
        600.0, description="Longest time for one request, from its start to the last byte of the answer. [K]"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields that a server wants in each request; null takes one out, as in {top_k: null, min_p: null} "
        "for a server that refuses what OpenAI's API does not have. [K]",
    )


class ServerSection(GenerationServer):
    """An OpenAI-compatible server that answers for policy and reference."""

    policy: str = Field(description="Name by which the server knows the policy. [K]")
    reference: str = Field(description="Name by which the server knows the reference. [K]")
    reference_url: str | None = Field(
        None, description="Address of the reference's server, where it has one of its own; null is base_url. [K]"
    )

    @model_validator(mode="after")
    def _other_address_is_one(self) -> ServerSection:
        if self.reference_url is not None:
            check_address(self.reference_url, "reference_url")
        return self

    @model_validator(mode="after")
    def _two_models(self) -> ServerSection:
        if self.policy == self.reference and self.of_reference().base_url == self.base_url:
            raise ValueError(
                f"policy and reference are both {self.policy!r} of one server, and would be one model. Give the "
                "reference a name or a server of its own"
            )
        return self

    def of_reference(self) -> ServerSection:
        """The server that answers for the reference."""
        return self if self.reference_url is None else self.model_copy(update={"base_url": self.reference_url})


class SamplingServerSection(GenerationServer):
    """An OpenAI-compatible server that answers for the starting model."""

    model: str = Field(description="Name by which the server knows the model. [K]")


def check_engine(engine: Any) -> Any:
    """Refuse an engine of an earlier version with what takes its place."""
    if engine == "vllm":
        raise ValueError(
            "'vllm' no longer runs in this process: start `vllm serve MODEL` and use engine: server, with its address "
            "and the models' names in the section `server`"
        )
    return engine


# What decodes, wherever a config says so.
Engine = Annotated[Literal["transformers", "server"], BeforeValidator(check_engine)]


def check_server(engine: str, server: GenerationServer | None, holds: str) -> None:
    """Refuse a server that nothing uses, and an engine that has none."""
    if (engine == "server") != (server is not None):
        raise ValueError(
            f"engine is {engine!r} and `server` is {'set' if server else 'missing'}: engine 'server' "
            f"needs a `server` section with {holds}, and no other engine uses one"
        )


def check_address(base_url: str, key: str = "base_url") -> None:
    """Refuse what is no address of a server, and one with a secret in it: a config is copied into every run folder.

    Raises:
        ValueError: with the remedy.
    """
    try:
        address = urlsplit(base_url)
        _ = address.port  # which is read only now
        usable = base_url.isascii() and base_url.isprintable() and " " not in base_url
    except ValueError:
        raise ValueError(f"{key}: is no http or https address") from None
    if "@" in address.netloc or address.query:
        # The value itself is left out of the message: it may hold a key.
        raise ValueError(f"{key}: takes no user, password or query. Put the key into the variable of api_key_env")
    if address.scheme not in ("http", "https") or not address.hostname or not usable:
        raise ValueError(f"{key}: {base_url!r} is no http or https address")
