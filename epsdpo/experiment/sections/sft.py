"""The `model.sft` section: supervised fine-tuning on the chosen responses, before preferences are learnt.

It only says what a config may hold; the training is `epsdpo.train.sft`'s. Defaults are those of the paper's
Anthropic-HH runs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from epsdpo.experiment.sections.base import PositiveInt, Section, Seed


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
