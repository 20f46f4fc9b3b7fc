"""The sections of an experiment: every key outside `train` with its type, default, meaning and source.

This module knows what an experiment is once it has been read. It leaves the `train` section to `EpsilonDPOConfig`
(TRL's and ours), the judge's keys to `epsdpo.judging.settings`, reading files to `epsdpo.experiment.load`, and the
wording of mistakes to `epsdpo.experiment.check`.

Each description ends with the source of what it says: [P] the paper, [R] its released configuration, [K] this kit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from epsdpo.judging.settings import JudgeSection

WORLD = "world"

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
    "disable_tqdm": "nowhere: progress is a line for each `logging_steps`",
}

PositiveInt = Annotated[int, Field(gt=0)]


class ConfigError(ValueError):
    """A config that cannot be run. The message names the file, the key, the value and the remedy."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WorldSection(_Section):
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


class DataSection(_Section):
    """Where preference pairs come from and how they are cut."""

    source: str = Field(
        WORLD, description="'world', a local JSON, JSONL, Parquet or Arrow file or folder, or a hub id. [K]"
    )
    revision: str | None = Field(
        None, description="Commit of a hub data set; null resolves the newest and records it. [K]"
    )
    subset: str | None = Field(
        None, description="`data_dir` of a hub data set, e.g. harmless-base of Anthropic/hh-rlhf. [K]"
    )
    train_split: str = Field("train", description="Name of the split to train on. [R]")
    eval_split: str | None = Field(
        None, description="Name of the held-out split; null for none. [K; R: the data set's test split]"
    )
    columns: dict[Literal["prompt", "chosen", "rejected", "pair_id"], str] = Field(
        default_factory=dict, description="Our column names with the source's, where they differ. [K]"
    )
    max_prompt_length: PositiveInt | None = Field(
        None, description="Tokens of the prompt to keep, cut from the left; null keeps all. [K; R: 1800]"
    )
    max_train_pairs: PositiveInt | None = Field(None, description="Take only the first so many training pairs. [K]")
    max_eval_pairs: PositiveInt | None = Field(None, description="Take only the first so many held-out pairs. [K]")
    world: WorldSection = Field(default_factory=WorldSection, description="Settings of the embedded world. [K]")


class ModelSection(_Section):
    """The policy's starting point, which is also the reference."""

    name_or_path: str = Field(WORLD, description="'world' (its SFT model), a local folder, or a hub id. [K]")
    revision: str | None = Field(
        None, description="Commit of a hub model; null resolves the newest and records it. [K]"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision in which the weights are loaded. [K; R: bfloat16]"
    )
    attn_implementation: str = Field("sdpa", description="'sdpa', 'eager' or 'flash_attention_2'. [K]")


class PromptsSection(_Section):
    """Which prompts policy and reference answer."""

    source: str = Field(
        WORLD,
        description="'world' (its held-out instructions), a local JSON, JSONL, Parquet or Arrow file, or a folder or "
        "hub data set of which `files` are read. Rows hold an instruction, a prompt, messages, or a pair's chosen "
        "conversation, of which all but the last turn is the prompt. [K; P: AlpacaEval 2 and Anthropic-HH]",
    )
    revision: str | None = Field(
        None, description="Commit of a hub data set; null resolves the newest and records it. [K]"
    )
    files: list[str] = Field(
        default_factory=list, description="Files of a folder or hub data set, e.g. helpful-base/test.jsonl.gz. [K]"
    )
    single_turn: bool = Field(
        False, description="Leave out prompts of more than one turn, as DPO's evaluation does. [P: section 4.1]"
    )
    max_prompts: PositiveInt | None = Field(None, description="Take only the first so many prompts. [K]")


class ServerSection(_Section):
    """An OpenAI-compatible server that answers for policy and reference."""

    base_url: str = Field(description="Where its API begins, e.g. http://localhost:8000/v1. [K]")
    policy: str = Field(description="Name by which the server knows the policy. [K]")
    reference: str = Field(description="Name by which the server knows the reference. [K]")
    endpoint: Literal["completions", "chat"] = Field(
        "completions",
        description="'completions' sends the prompt's token ids, so that it is read as in training; 'chat' sends "
        "messages, which the server renders itself. [K]",
    )
    api_key_env: str | None = Field(None, description="Environment variable that holds the key; null sends none. [K]")
    timeout: Annotated[float, Field(gt=0)] = Field(600.0, description="Seconds until an answer must be complete. [K]")
    attempts: PositiveInt = Field(6, description="How often a prompt is sent before it counts as failed. [K]")
    backoff: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Seconds before the second attempt, doubled before each further one; Retry-After wins. [K]"
    )


class CalibrateSection(_Section):
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


class EvaluateSection(_Section):
    """How policy and reference answer prompts, and how the answers are compared."""

    prompts: PromptsSection = Field(default_factory=PromptsSection, description="Which prompts are answered. [K]")
    engine: Literal["transformers", "vllm", "server"] = Field(
        "transformers",
        description="What decodes: transformers in this process, vLLM in this process (pip install 'epsdpo[vllm]'), or "
        "the `server`. [K]",
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
    bootstrap_samples: PositiveInt = Field(2000, description="Resamples of the prompts behind each interval. [K]")

    @model_validator(mode="after")
    def _server_is_used(self) -> EvaluateSection:
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                f"engine is {self.engine!r} and `server` is {'set' if self.server else 'missing'}: engine 'server' "
                "needs a `server` section with base_url, policy and reference, and no other engine uses one"
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


class Experiment(_Section):
    """One run: a method on a model and data, with everything that decides its outcome."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the run folder; by default the file's name. [K]"
    )
    title: str = Field(description="How figures and tables call this run; by default its name. [K]")
    method: Literal["dpo", "epsilon_dpo"] = Field(
        description="Objective: DPO, which keeps β, or ε-DPO, which gives each pair a β of its own. [P: Eq. 5]"
    )
    seed: Annotated[int, Field(ge=0)] = Field(42, description="Seed of data order, sampling and evaluation. [R]")
    data: DataSection = Field(default_factory=DataSection, description="Where preference pairs come from. [K]")
    model: ModelSection = Field(default_factory=ModelSection, description="What policy and reference start from. [K]")
    train: dict[str, Any] = Field(description="How the policy is trained: keys of EpsilonDPOConfig. [K]")
    evaluate: EvaluateSection | None = Field(
        None, description="How the trained policy is compared with its reference; null skips that stage. [K]"
    )

    @field_validator("train")
    @classmethod
    def _with_defaults(cls, train: dict[str, Any]) -> dict[str, Any]:
        return {**TRAIN_DEFAULTS, **train}

    @model_validator(mode="after")
    def _sections_agree(self) -> Experiment:
        if self.model.name_or_path == WORLD and self.data.source != WORLD:
            raise ValueError(
                f"model.name_or_path is 'world' but data.source is {self.data.source!r}: the world's model knows only "
                "the world's words. Name a model, or use data.source: world"
            )
        if self.evaluate is not None and self.evaluate.prompts.source == WORLD != self.data.source:
            raise ValueError(
                f"evaluate.prompts.source is 'world', but data.source is {self.data.source!r}: there are no "
                "held-out instructions of the world to answer. Name a file or data set of prompts, or remove it"
            )
        if self.method == "dpo":
            if self.train.get("epsilon_step", 0.0) != 0.0:
                raise ValueError(
                    f"train.epsilon_step is {self.train['epsilon_step']!r}, but method 'dpo' keeps β constant. "
                    "Remove the key, or use method: epsilon_dpo"
                )
            if "beta_update" in self.train:
                raise ValueError("train.beta_update has no effect under method 'dpo'. Remove it")
        return self

    def training_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `EpsilonDPOConfig` for this run, except `output_dir`.

        Plain DPO is ε-DPO with steps of size 0: β stays where it is, while the record still shows which pairs the
        criterion would have moved (the measurement behind the paper's Figure 4a).
        """
        arguments = {**self.train, "seed": self.seed}
        if self.method == "dpo":
            arguments["epsilon_step"] = 0.0
        return arguments
