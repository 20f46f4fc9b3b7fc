"""The `model` section: what policy and reference start from, fine-tuned first or with adapters where it says so.

Defaults of `model.sft` are those of the paper's Anthropic-HH runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from epsdpo.experiment.sections.base import WORLD, PositiveInt, Section, Seed


class LoraSection(Section):
    """Low-rank adapters that are trained in place of the weights, by PEFT; the reference is the model without them."""

    r: PositiveInt = Field(16, description="Rank of the adapters. [K]")
    alpha: PositiveInt = Field(32, description="What they add is scaled by alpha / r. [K]")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the adapters' inputs that is left out in training. [K]"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="Names of the layers that get one; 'all-linear' is all but the output head. That head, and an "
        "embedding that shares its weight, are refused. [K]",
    )


class SftSection(Section):
    """How the base model is fine-tuned on prompts and chosen responses; policy and reference both start from it."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(2.0e-5, description="Peak learning rate. [P: section 4.1]")
    num_train_epochs: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Passes over the chosen responses. [P: section 4.1]"
    )
    global_batch_size: PositiveInt = Field(
        128, description="Responses per optimiser step, over all processes. [P: section 4.1]"
    )
    per_device_train_batch_size: PositiveInt = Field(
        1, description="Of these, per process and forward pass; it decides speed and memory, not the result. [K]"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="Shape of the learning-rate schedule. [P: section 4.1]"
    )
    warmup_steps: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Steps in which the learning rate rises; below 1 their share of all. [P: section 4.1]"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Weight decay of AdamW. [P: section 4.1]")
    max_length: PositiveInt = Field(
        1024, description="Prompt and response together, in tokens; longer ones are cut on the right. [K]"
    )
    bf16: bool = Field(False, description="Mixed precision; the weights themselves are in `model.dtype`. [K]")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, to save memory. [K]"
    )
    save_steps: Annotated[float, Field(gt=0)] = Field(
        0.2, description="Steps between checkpoints; below 1 their share of all. The newest is kept. [K]"
    )
    logging_steps: PositiveInt = Field(10, description="Steps between lines of progress. [K]")
    seed: Seed = Field(
        42,
        description="Seed of the order of the responses. It is apart from the experiment's, so that runs with several "
        "seeds share one SFT model. [K]",
    )


class ModelSection(Section):
    """The policy's starting point, which is also the reference."""

    name_or_path: str = Field(
        WORLD, description="'world' (its SFT model), a local folder or GGUF file, or a hub id. [K]"
    )
    revision: str | None = Field(
        None,
        description="Commit of a hub model, or 'sha256:' and the digest of a GGUF file; null resolves the newest, or "
        "that of the file, and records it. [K]",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision in which the weights are loaded. [K; R: bfloat16]"
    )
    attn_implementation: str = Field("sdpa", description="'sdpa', 'eager' or 'flash_attention_2'. [K]")
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the model's own: a local .jinja file, or the folder or hub id (with "
        "@commit, if it is to stay) of a model that has one. [P: section 4.1, gemma-2-2b-it's for gemma-2-2b]",
    )
    lora: LoraSection | None = Field(
        None,
        description="Train low-rank adapters, with these settings ({} for the defaults), and merge them into the "
        "weights at the end; null trains all weights, as the paper does. [K]",
    )
    sft: SftSection | None = Field(
        None,
        description="Fine-tune the model on the chosen responses first; null takes it as it is. [P: section 4.1]",
    )
