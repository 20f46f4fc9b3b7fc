"""The `evaluate.judge` section of a config: which judge, and how it is asked.

Each description ends with the source of what it says: [P] the paper, [R] the released configuration of AlpacaEval's
judge, which the paper used, [K] this kit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from epsdpo.experiment.sections.base import PositiveInt
from epsdpo.experiment.sections.server import ACCESS, Access

Price = Annotated[float, Field(ge=0)]

_OF_READERS = ("order", "template", "top_logprobs")
_OF_CHAT = (*ACCESS, "mode", "temperature", "max_tokens", "extra_body", "input_price", "output_price")
_OF_LOCAL = ("revision", "dtype", "batch_size")
_USED_BY = {
    "gold": (),
    "chat": ("model", *_OF_READERS, *_OF_CHAT),
    "causal_lm": ("model", *_OF_READERS, *_OF_LOCAL),
    "reward_model": ("model", *_OF_LOCAL),
    "pair_ranker": ("model", "order", *_OF_LOCAL),
}


class JudgeSection(Access):
    """Who compares the outputs, and how it is asked."""

    kind: Literal["gold", "chat", "causal_lm", "reward_model", "pair_ranker"] = Field(
        "gold",
        description="'gold' is the embedded world's own reward, 'chat' an OpenAI-compatible server; the others run "
        "here: a causal language model, a sequence classifier with one label, a pair ranker like PairRM. "
        "[K; P: GPT-4 Turbo for AlpacaEval 2, PairRM for Anthropic-HH]",
    )
    model: str | None = Field(
        None, description="The judge: its name on the server, or a hub id or local folder. [K; R: gpt-4-1106-preview]"
    )
    revision: str | None = Field(None, description="Commit of a hub model; null asks for the newest. [K]")
    mode: Literal["logprobs", "text"] = Field(
        "logprobs",
        description="Preference from log-probabilities of the answer's first token, or 1 or 2 from its text. "
        "[R: AlpacaEval]",
    )
    order: Literal["seeded", "both"] = Field(
        "seeded",
        description="'seeded' shows the outputs in AlpacaEval's order for the instruction; 'both' asks twice, takes "
        "the mean, and reports how consistent the judge is. [R: AlpacaEval]",
    )
    template: str | None = Field(
        None,
        description="File with the judge's messages in ChatML and places {instruction}, {output_1}, {output_2}; null "
        "takes this kit's. [K; R: alpaca_eval_clf.txt]",
    )
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = Field(
        5,
        description="Tokens among which the identifiers m and M are looked for; one that is missing counts 0, and with "
        "less than one half on both together the comparison has failed. [R: AlpacaEval]",
    )
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Sampling temperature of the judge. [R: AlpacaEval]"
    )
    max_tokens: PositiveInt = Field(
        16, description="Longest answer in text mode, in tokens; log-probabilities need one. [K; R: 1]"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields that a server wants in each request; null takes one out, as in {max_tokens: null, "
        "max_completion_tokens: 16}. [K]",
    )
    input_price: Price | None = Field(
        None, description="Price of a million prompt tokens, in any currency; null leaves costs out. [K]"
    )
    output_price: Price | None = Field(None, description="Price of a million completion tokens. [K]")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of a judge that runs here. [K]"
    )
    batch_size: PositiveInt = Field(8, description="Comparisons that a judge that runs here reads at once. [K]")

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> JudgeSection:
        # A saved config states every default, so that only other values count as a wish.
        stated = {
            name
            for name, key in type(self).model_fields.items()
            if getattr(self, name) != key.get_default(call_default_factory=True)
        }
        unused = sorted(stated - {"kind", *_USED_BY[self.kind]})
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: no effect on a judge of kind {self.kind!r}. Remove the key, or change the kind"
            )
        if self.kind != "gold" and self.model is None:
            raise ValueError(f"model: a judge of kind {self.kind!r} needs one")
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("input_price and output_price: give both, or neither")
        if self.kind == "chat" and self.base_url is None:
            raise ValueError("base_url: a judge of kind 'chat' needs one, e.g. http://localhost:8000/v1")
        return self
