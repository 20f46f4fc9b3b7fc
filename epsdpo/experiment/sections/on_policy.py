"""The sections that say which prompts are answered, and how a model's own answers become preference pairs.

The paper built its Qwen2.5 pairs by SimPO's process (Table 3) and states none of its settings; defaults are those of
the script that SimPO published, marked [K; SimPO].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from epsdpo.experiment.sections.base import WORLD, PositiveInt, Section, Seed
from epsdpo.experiment.sections.server import Engine, SamplingServerSection, check_server


class PromptsSection(Section):
    """Which prompts are answered."""

    source: str = Field(
        WORLD,
        description="'world' (its instructions), a local JSON, JSONL, Parquet or Arrow file, or a folder or "
        "hub data set of which `files` are read. Rows hold an instruction, a prompt, messages, or a pair's chosen "
        "conversation, of which all but the last turn is the prompt. [K; P: AlpacaEval 2 and Anthropic-HH]",
    )
    revision: str | None = Field(
        None, description="Commit of a hub data set; null resolves the newest and records it. [K]"
    )
    files: list[str] = Field(
        default_factory=list, description="Files of a folder or hub data set, e.g. helpful-base/test.jsonl.gz. [K]"
    )
    column: str | None = Field(
        None,
        description="Column that holds the prompts, as text or messages; null takes the first of messages, "
        "instruction, prompt and chosen that a row has. UltraFeedback's `messages` hold answers: name `prompt`. [K]",
    )
    single_turn: bool = Field(
        False, description="Leave out prompts of more than one turn, as DPO's evaluation does. [P: section 4.1]"
    )
    max_prompts: PositiveInt | None = Field(None, description="Take only the first so many prompts. [K]")


class RankerSection(Section):
    """What scores the responses to one prompt, so that the best and the worst can be told."""

    model: str = Field(
        description="'world' (its gold reward), or a local folder or hub id of a reward model: a sequence classifier "
        "with one label, without code of its own. [K; SimPO: ArmoRM, whose own code this kit does not run]"
    )
    revision: str | None = Field(None, description="Commit of a hub model; null takes the newest. [K]")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="Precision of its weights. [K]")
    batch_size: PositiveInt = Field(16, description="Responses scored at once; it decides speed and memory. [K]")


class OnPolicySection(Section):
    """How the starting model's own responses become the pairs that it is trained on."""

    prompts: PromptsSection = Field(
        default_factory=PromptsSection,
        description="Which prompts are answered, each once; of the world its training instructions. [P: UltraFeedback]",
    )
    ranker: RankerSection = Field(description="What scores the responses. [K]")
    responses_per_prompt: Annotated[int, Field(ge=2)] = Field(
        5, description="Responses to each prompt, of which best and worst become chosen and rejected. [K; SimPO]"
    )
    engine: Engine = Field(
        "transformers",
        description="What decodes: transformers in this process, or the `server`, such as `vllm serve` starts one. "
        "[K; SimPO: vLLM]",
    )
    server: SamplingServerSection | None = Field(None, description="The server of `engine: server`. [K]")
    temperature: Annotated[float, Field(gt=0)] = Field(0.8, description="Sampling temperature. [K; SimPO]")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(0.95, description="Nucleus sampling mass; 1 is all. [K; SimPO]")
    max_new_tokens: PositiveInt = Field(4096, description="Longest response, in tokens. [K; SimPO]")
    stop_token_ids: list[int] = Field(
        default_factory=list,
        description="Tokens that end a response, beside those of the model's generation_config and the tokenizer's "
        "EOS. [K]",
    )
    batch_size: PositiveInt = Field(64, description="Prompts answered at once. [K]")
    seed: Seed = Field(
        42,
        description="Seed of the first response to each prompt; the next ones count up. It is apart from the "
        "experiment's, so that runs with several seeds share their pairs. [K; SimPO: 13, 21, 42, 79, 100]",
    )

    @model_validator(mode="after")
    def _server_is_used(self) -> OnPolicySection:
        check_server(self.engine, self.server, "base_url and model")
        return self

    @model_validator(mode="after")
    def _ranker_knows_the_prompts(self) -> OnPolicySection:
        if self.ranker.model == WORLD != self.prompts.source:
            raise ValueError(
                f"ranker.model is 'world', but prompts.source is {self.prompts.source!r}: the gold reward knows the "
                "world's instructions only. Name a reward model"
            )
        return self
