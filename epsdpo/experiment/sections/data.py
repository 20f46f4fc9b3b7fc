"""The `data` section: where preference pairs come from and how they are cut."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from epsdpo.experiment.sections.base import TEMPLATE_DATE, WORLD, Day, PositiveInt, Section, Seed
from epsdpo.experiment.sections.on_policy import OnPolicySection

ON_POLICY = "on_policy"


class WorldSection(Section):
    """The embedded offline world: how many prompts, responses and pairs it makes, and how noisy its labels are."""

    train_pairs: PositiveInt = Field(3840, description="Preference pairs to train on. [K]")
    eval_pairs: PositiveInt = Field(256, description="Held-out preference pairs, for loss and margins in eval. [K]")
    prompts: PositiveInt = Field(512, description="Held-out instructions that 04_evaluate answers. [K]")
    responses_per_prompt: Annotated[int, Field(ge=2)] = Field(
        4, description="Responses sampled per instruction, of which best and worst by noisy label form the pair. [K]"
    )
    label_temperature: Annotated[float, Field(gt=0)] = Field(
        0.15, description="Temperature of the Bradley-Terry label noise, in units of gold reward. [K]"
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Seed of the world itself: instructions, SFT model, labels. [K]"
    )


class DataSection(Section):
    """Where preference pairs come from and how they are cut."""

    source: str = Field(
        WORLD,
        description="'world', a local JSON, JSONL, Parquet or Arrow file or folder, a hub id, or 'on_policy': pairs of "
        "the starting model's own responses, as the section `on_policy` says. [K]",
    )
    revision: str | None = Field(
        None, description="Commit of a hub data set; null resolves the newest and records it. [K]"
    )
    subset: str | list[str] | None = Field(
        None,
        description="`data_dir` of a hub data set, or several one after the other, e.g. helpful-base and harmless-base "
        "of Anthropic/hh-rlhf. [P: section 4.1]",
    )
    train_split: str = Field("train", description="Name of the split to train on. [R]")
    eval_split: str | None = Field(
        None, description="Name of the held-out split; null for none. [K; R: the data set's test split]"
    )
    eval_share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="Share of the distinct prompts of `train_split` to hold out, with all their pairs, where there is "
        "no held-out split; null holds out none. No prompt is on both sides. [K]",
    )
    eval_seed: Seed = Field(
        42,
        description="Seed by which `eval_share` draws prompts. It is apart from the experiment's, so that runs with "
        "several seeds share their data. [K]",
    )
    columns: dict[Literal["prompt", "chosen", "rejected", "pair_id", "system", "tools"], str] = Field(
        default_factory=dict, description="Our column names with the source's, where they differ. [K]"
    )
    max_prompt_length: PositiveInt | None = Field(
        None, description="Tokens of the prompt to keep, cut from the left; null keeps all. [K; R: 1800]"
    )
    template_date: Day = Field(
        TEMPLATE_DATE,
        description="The day that a chat template is told which writes today's date, as those of Llama 3.1 and later "
        "do, so that training and evaluation read the same texts on any day. [K; Llama's own without a clock]",
    )
    max_train_pairs: PositiveInt | None = Field(None, description="Take only the first so many training pairs. [K]")
    max_eval_pairs: PositiveInt | None = Field(None, description="Take only the first so many held-out pairs. [K]")
    on_policy: OnPolicySection | None = Field(
        None, description="How `source: on_policy` samples and ranks responses. [K; P: Table 3]"
    )
    world: WorldSection = Field(default_factory=WorldSection, description="Settings of the embedded world. [K]")

    @model_validator(mode="after")
    def _on_policy_is_used(self) -> DataSection:
        if (self.source == ON_POLICY) != (self.on_policy is not None):
            raise ValueError(
                f"source is {self.source!r} and `on_policy` is {'set' if self.on_policy else 'missing'}: source "
                "'on_policy' needs an `on_policy` section with a ranker, and no other source uses one"
            )
        if self.on_policy is not None and self.eval_split is not None:
            raise ValueError(
                f"eval_split is {self.eval_split!r}, but pairs that are sampled have one split only. Remove it"
            )
        return self

    @model_validator(mode="after")
    def _held_out_once(self) -> DataSection:
        if self.eval_share is not None and self.eval_split is not None:
            raise ValueError(
                f"eval_share is {self.eval_share} and eval_split is {self.eval_split!r}: pairs are held out once. "
                "Remove one of them"
            )
        return self

    @property
    def holds_out(self) -> bool:
        """Whether there are pairs to evaluate on within training."""
        return self.eval_split is not None or self.eval_share is not None

    @property
    def speaks_world(self) -> bool:
        """Whether prompts and responses are in the embedded world's language."""
        return WORLD in (self.source, self.on_policy.prompts.source if self.on_policy else None)
