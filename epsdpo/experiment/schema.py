"""An experiment: its sections, every key outside `train` with its type, default, meaning and source.

The keys of `train` are the fields of the method's own config. Each description ends with the source of what it says:
[P] the paper, [R] its released configuration, [K] this kit.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from epsdpo.experiment.sections.base import WORLD, Section
from epsdpo.experiment.sections.data import DataSection
from epsdpo.experiment.sections.evaluate import EvaluateSection
from epsdpo.experiment.sections.model import ModelSection
from epsdpo.methods.catalogue import (
    CATALOGUE,
    CRITERION_DEFAULTS,
    METHODS,
    NO_METHODS,
    SHARED_PASS,
    decided_by,
    only_under,
)

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


LONGEST_NAME = 200  # files of the run are called by it, with up to fifty characters more; a file's name has 255 at most


class Experiment(Section):
    """One run: a method on a model and data, with everything that decides its outcome."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME)] = Field(
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
        method = CATALOGUE[self.method]
        if self.train.get("epsilon_step") and "epsilon_step" in method.decides:
            raise ValueError(
                f"train.epsilon_step is {self.train['epsilon_step']!r}, but method {self.method!r} {method.beta}. "
                "Remove the key, or use method: epsilon_dpo"
            )
        if method.decides.get("sync_ref_model") and self.model.lora is not None:
            raise ValueError(
                f"model.lora is set, but method {self.method!r} moves the weights of its reference, and with adapters "
                "it has none of its own. Remove model.lora"
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
            if self.method not in only_under(key):
                raise ValueError(
                    f"train.{key} has no effect under method {self.method!r}. Remove it, or use method: "
                    f"{' or '.join(only_under(key))}"
                )
        return self

    def training_arguments(self) -> dict[str, Any]:
        """The keyword arguments for the config of the method's trainer, except `output_dir`."""
        return {**self.train, "seed": self.seed, **decided_by(self.method)}

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
        return self.criterion().get("epsilon_step", 0.0) > 0.0
