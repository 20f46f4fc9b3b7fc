"""The sections of an experiment: every key outside `train` with its type, default, meaning and source.

This module knows what an experiment is once it has been read. It leaves the `train` section to `EpsilonDPOConfig`
(TRL's and ours), most other sections to modules of their own, reading files to `epsdpo.experiment.load`, and
the wording of mistakes to `epsdpo.experiment.validate`.

Each description ends with the source of what it says: [P] the paper, [R] its released configuration, [K] this kit.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from epsdpo.experiment.sections.base import TEMPLATE_DATE, WORLD, Day, PositiveInt, Section, Seed
from epsdpo.experiment.sections.evaluate import EvaluateSection
from epsdpo.experiment.sections.on_policy import OnPolicySection
from epsdpo.experiment.sections.sft import SftSection
from epsdpo.methods.catalogue import CRITERION_DEFAULTS, METHODS, NO_METHODS, ONLY_UNDER, SHARED_PASS, decided_by

ON_POLICY = "on_policy"

# Defaults of the `train` section that are not left to the trainer: without the first the batch, and with it the result,
# would grow with the number of processes; by the second data are cut, long before trl is loaded, whose default it is.
TRAIN_DEFAULTS = {"global_batch_size": 128, "max_length": 1024}

# Keys of the trainer's config that an experiment states elsewhere, with the place to say them.
STATED_ELSEWHERE = {
    "output_dir": "the --output option of the command",
    "seed": "the top-level `seed`",
    "data_seed": "the top-level `seed`",
    "model_init_kwargs": "the `model` section",
    "gradient_accumulation_steps": "`global_batch_size`, from which it follows on any number of processes",
    "hub_token": "the environment variable HF_TOKEN: a config is copied into every run folder",
    "trust_remote_code": "nowhere: code from a hub is never run",
    "resume_from_checkpoint": "nowhere: an interrupted run resumes by itself",
    "start_over": "nowhere: delete the run's folder, or choose another with --output",
    "loss_type": "the top-level `method`, which has TRL's losses by their names",
    "loss_weights": "nowhere: a method has one loss",
    "sync_ref_model": "the top-level `method`: tr_dpo moves its reference",
    "disable_tqdm": "nowhere: progress is a line for each `logging_steps`",
}

# Keys of `train` that decide what becomes of an earlier part of the run, and not what it comes to.
ABOUT_EARLIER_PARTS = ("fresh_record",)


class ConfigError(ValueError):
    """A config that cannot be run. The message names the file, the key, the value and the remedy."""


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


class ModelSection(Section):
    """The policy's starting point, which is also the reference."""

    name_or_path: str = Field(WORLD, description="'world' (its SFT model), a local folder, or a hub id. [K]")
    revision: str | None = Field(
        None, description="Commit of a hub model; null resolves the newest and records it. [K]"
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


class Experiment(Section):
    """One run: a method on a model and data, with everything that decides its outcome."""

    # Files of the run are called by it, with up to fifty characters more; a file's name has 255 at most.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] = Field(
        description="Name of the run folder; by default the file's name. [K]"
    )
    title: str = Field(description="How figures and tables call this run; by default its name. [K]")
    method: Literal[METHODS] = Field(
        description="Objective: DPO, which keeps β; ε-DPO, which gives each pair a β of its own [P: Eq. 5]; TR-DPO, "
        "which moves the reference; β-DPO, which gives each batch a β; a loss of TRL's DPO by TRL's name; or SimPO, "
        "CPO, ORPO and KTO as TRL has them. [P: Tables 1 and 2]"
    )
    seed: Annotated[int, Field(ge=0)] = Field(42, description="Seed of data order, sampling and evaluation. [R]")
    data: DataSection = Field(default_factory=DataSection, description="Where preference pairs come from. [K]")
    model: ModelSection = Field(default_factory=ModelSection, description="What policy and reference start from. [K]")
    train: dict[str, Any] = Field(
        description="How the policy is trained: keys of EpsilonDPOConfig, or of the method's own config. [K]"
    )
    trajectory: bool = Field(
        True, description="Whether the run gets a page of its own about its β; the record is kept anyway. [K]"
    )
    evaluate: EvaluateSection | None = Field(
        None, description="How the trained policy is compared with its reference; null skips that stage. [K]"
    )

    @field_validator("title")
    @classmethod
    def _can_be_shown(cls, title: str) -> str:
        if not title.strip():
            raise ValueError(f"{title!r} says nothing. Write one, or leave the key out for the experiment's name")
        if title.startswith("_"):
            raise ValueError(f"{title!r} begins with '_', and legends of figures leave out what does. Change it")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in title):
            raise ValueError(f"{title!a} holds control characters, or half of one. Write plain text in one line")
        return title

    @field_validator("method", mode="before")
    @classmethod
    def _is_a_method(cls, method: Any) -> Any:
        if method in NO_METHODS:
            raise ValueError(f"there is no method {method!r}: {NO_METHODS[method]}. Methods are {', '.join(METHODS)}")
        return method

    @field_validator("train")
    @classmethod
    def _with_defaults(cls, train: dict[str, Any]) -> dict[str, Any]:
        return {**TRAIN_DEFAULTS, **train}

    @model_validator(mode="after")
    def _sections_agree(self) -> Experiment:
        if self.model.name_or_path == WORLD and not self.data.speaks_world:
            raise ValueError(
                f"model.name_or_path is 'world' but data.source is {self.data.source!r}: the world's model knows only "
                "the world's words. Name a model, or use data.source: world"
            )
        if self.evaluate is not None and self.evaluate.prompts.source == WORLD and not self.data.speaks_world:
            raise ValueError(
                f"evaluate.prompts.source is 'world', but data.source is {self.data.source!r}: there are no "
                "held-out instructions of the world to answer. Name a file or data set of prompts, or remove it"
            )
        if self.evaluate is not None and self.evaluate.judge is not None and self.name == self.evaluate.against:
            raise ValueError(
                f"name is {self.name!r}, which is what annotations.json calls the other side (evaluate.against): both "
                "sides would pass for one model. Choose another name"
            )
        if self.train.get("epsilon_step") and "epsilon_step" in decided_by(self.method):
            rule = "sets β batch by batch" if self.method == "beta_dpo" else "keeps β constant"
            raise ValueError(
                f"train.epsilon_step is {self.train['epsilon_step']!r}, but method {self.method!r} {rule}. "
                "Remove the key, or use method: epsilon_dpo"
            )
        if self.method == "tr_dpo" and self.model.lora is not None:
            raise ValueError(
                "model.lora is set, but method 'tr_dpo' moves the weights of its reference, and with adapters it has "
                "none of its own. Remove model.lora"
            )
        if self.evaluate is not None and self.evaluate.checkpoints:
            if self.model.lora is not None:
                raise ValueError(
                    "evaluate.checkpoints is true, but with model.lora checkpoints hold adapters alone, and only the "
                    "last are merged into a model. Set evaluate.checkpoints: false, or remove model.lora"
                )
            if self.train.get("save_strategy") == "no":
                raise ValueError(
                    "evaluate.checkpoints is true, but train.save_strategy is 'no', so there will be none. "
                    "Use train.save_strategy: steps with save_total_limit: null, or set evaluate.checkpoints: false"
                )
        for key in self.train:
            if self.method not in ONLY_UNDER.get(key, METHODS):
                raise ValueError(
                    f"train.{key} has no effect under method {self.method!r}. Remove it, or use method: "
                    f"{' or '.join(ONLY_UNDER[key])}"
                )
        return self

    def training_arguments(self) -> dict[str, Any]:
        """The keyword arguments for the config of the method's trainer, except `output_dir`."""
        arguments = {**self.train, "seed": self.seed, **decided_by(self.method)}
        return arguments

    def criterion(self) -> dict[str, Any]:
        """epsilon, epsilon_step and criterion_dtype that the run has, also those that its config leaves to the default.

        Empty for a method that makes no decisions.
        """
        if self.method not in SHARED_PASS:
            return {}
        arguments = {**CRITERION_DEFAULTS, **self.training_arguments()}
        step = arguments.get("epsilon_step")
        arguments["epsilon_step"] = arguments["epsilon"] if step is None else step
        return {key: arguments[key] for key in ("epsilon", "epsilon_step", "criterion_dtype")}

    @property
    def beta_follows(self) -> bool:
        """Whether β follows the decisions of the pairs; elsewhere they are recorded and change nothing."""
        return self.method == "epsilon_dpo" and self.criterion()["epsilon_step"] > 0.0
