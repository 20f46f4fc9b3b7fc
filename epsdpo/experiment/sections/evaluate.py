"""The `evaluate` section: which prompts policy and reference answer, through what, and how the answers are compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from epsdpo.experiment.sections.base import WORLD, PositiveInt, Section
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.experiment.sections.on_policy import PromptsSection
from epsdpo.experiment.sections.server import Engine, ServerSection, check_server


class CalibrateSection(Section):
    """Published judgements that `judge` repeats, so that its numbers can be read beside the published ones."""

    annotations: str = Field(
        description="File of judgements: AlpacaEval's annotations.json, plain or gzipped, or its reduced form. [K]"
    )
    outputs: str | None = Field(
        None, description="File with the judged model's outputs; null where the annotations hold them. [K]"
    )
    reference_outputs: str | None = Field(
        None, description="File with the reference's outputs; null where the annotations hold them. [K]"
    )
    max_prompts: PositiveInt | None = Field(
        None, description="Judge only so many, drawn at random by the seed; null judges all. [K]"
    )


class EvaluateSection(Section):
    """How policy and reference answer prompts, and how the answers are compared."""

    prompts: PromptsSection = Field(default_factory=PromptsSection, description="Which prompts are answered. [K]")
    engine: Engine = Field(
        "transformers",
        description="What decodes: transformers in this process, or the `server`, such as `vllm serve` starts one. [K]",
    )
    server: ServerSection | None = Field(None, description="The server of `engine: server`. [K]")
    temperature: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Sampling temperature; 0 is greedy. [P: section 4.1]"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling mass; 1 is all. [K]")
    max_new_tokens: PositiveInt = Field(64, description="Longest response, in tokens. [K; P: 1024 in section 4.1]")
    stop_token_ids: list[int] = Field(
        default_factory=list,
        description="Tokens that end a response, beside those of the model's generation_config and the tokenizer's "
        "EOS. [K]",
    )
    batch_size: PositiveInt = Field(64, description="Prompts answered at once. [K]")
    judge: JudgeSection | None = Field(
        default_factory=JudgeSection,
        description="Who compares the responses; null compares none, and measures lengths and KL alone. [K]",
    )
    against: Literal["reference", "given"] = Field(
        "reference",
        description="What the policy's responses are compared with: 'reference' is the model that training started "
        "from, 'given' the response that each prompt brings along: AlpacaEval's of GPT-4 Turbo, Anthropic-HH's chosen "
        "one. [K; P: 'given']",
    )
    calibrate_with: CalibrateSection | None = Field(
        None, description="Published judgements beside which the judge is put; null leaves that out. [K]"
    )
    checkpoints: bool = Field(
        False,
        description="Measure every kept checkpoint as well, each against the same reference: how win rate and KL move "
        "within training. [P: Figure 3]",
    )
    bootstrap_samples: PositiveInt = Field(2000, description="Resamples of the prompts behind each interval. [K]")

    @model_validator(mode="after")
    def _server_is_used(self) -> EvaluateSection:
        check_server(self.engine, self.server, "base_url, policy and reference")
        return self

    @model_validator(mode="after")
    def _checkpoints_can_be_asked(self) -> EvaluateSection:
        if self.checkpoints and self.engine == "server":
            raise ValueError(
                "checkpoints is true, but engine is 'server': a server answers for the models it was started with, and "
                "not for each checkpoint. Use engine 'transformers', or set checkpoints: false"
            )
        return self

    @model_validator(mode="after")
    def _judge_knows_the_prompts(self) -> EvaluateSection:
        if self.judge is not None and self.judge.kind == "gold" and self.prompts.source != WORLD:
            raise ValueError(
                f"judge.kind is 'gold', but prompts.source is {self.prompts.source!r}: the gold judge knows the "
                "world's instructions only. Name another judge, or set judge: null to measure without one"
            )
        if self.against == "given" and self.prompts.source == WORLD:
            raise ValueError("against is 'given', but the world's prompts bring no responses along. Use 'reference'")
        if self.calibrate_with is not None and (self.judge is None or self.judge.kind == "gold"):
            raise ValueError(
                "calibrate_with repeats published judgements, which needs a judge that reads them: set judge.kind to "
                "another than 'gold', or remove calibrate_with"
            )
        return self
