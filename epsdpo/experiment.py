"""Experiment configs: what one YAML file may say, checked in full before any work starts.

This module knows the names and types of every key. It leaves the meaning of the `train` section to `EpsilonDPOConfig`
(TRL's and ours) and never touches data, models or run folders.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from epsdpo.files import written_whole

WORLD = "world"
EXPERIMENT_FILE = "experiment.yaml"
GLOBAL_BATCH_SIZE = 128  # the paper's, for every run of its Table 1

# Keys of the trainer's config that an experiment states elsewhere, with the place to say them.
_STATED_ELSEWHERE = {
    "output_dir": "the --output option of the command",
    "seed": "the top-level `seed`",
    "data_seed": "the top-level `seed`",
    "model_init_kwargs": "the `model` section",
    "gradient_accumulation_steps": "`global_batch_size`, from which it follows on any number of processes",
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

    train_pairs: PositiveInt = Field(3840, description="preference pairs to train on")
    eval_pairs: PositiveInt = Field(256, description="held-out preference pairs, for the loss and margins in eval")
    prompts: PositiveInt = Field(512, description="held-out instructions that 04_evaluate answers")
    responses_per_prompt: Annotated[int, Field(ge=2)] = Field(
        4, description="responses sampled per instruction, of which best and worst by noisy label form the pair"
    )
    label_temperature: Annotated[float, Field(gt=0)] = Field(
        0.15, description="temperature of the Bradley-Terry label noise, in units of gold reward"
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="seed of the world itself: instructions, SFT model, labels"
    )


class DataSection(_Section):
    """Where preference pairs come from and how they are cut."""

    source: str = Field(WORLD, description="'world', a local JSON/JSONL/Parquet/Arrow file or folder, or a hub id")
    revision: str | None = Field(None, description="commit of a hub data set; null resolves the newest and records it")
    subset: str | None = Field(
        None, description="`data_dir` of a hub data set, e.g. harmless-base of Anthropic/hh-rlhf"
    )
    train_split: str = Field("train", description="name of the split to train on")
    eval_split: str | None = Field(None, description="name of the held-out split; null for none")
    columns: dict[Literal["prompt", "chosen", "rejected", "pair_id"], str] = Field(
        default_factory=dict, description="our column name -> the source's, where they differ"
    )
    max_prompt_length: PositiveInt | None = Field(
        None, description="tokens of the prompt to keep, cut from the left as in the paper's runs; null keeps all"
    )
    max_train_pairs: PositiveInt | None = Field(None, description="take only the first so many training pairs")
    max_eval_pairs: PositiveInt | None = Field(None, description="take only the first so many held-out pairs")
    world: WorldSection = Field(default_factory=WorldSection, description="settings of the embedded world")


class ModelSection(_Section):
    """The policy's starting point, which is also the reference."""

    name_or_path: str = Field(WORLD, description="'world' (its SFT model), a local folder, or a hub id")
    revision: str | None = Field(None, description="commit of a hub model; null resolves the newest and records it")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype the weights are loaded in")
    attn_implementation: str = Field("sdpa", description="'sdpa', 'eager' or 'flash_attention_2'")


class EvaluateSection(_Section):
    """How policy and reference answer the held-out prompts, and how the answers are compared."""

    temperature: Annotated[float, Field(ge=0)] = Field(1.0, description="sampling temperature; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus sampling mass")
    max_new_tokens: PositiveInt = Field(64, description="longest response, in tokens")
    batch_size: PositiveInt = Field(64, description="prompts answered at once")
    bootstrap_samples: PositiveInt = Field(2000, description="resamples of the prompts behind each interval")


class Experiment(_Section):
    """One run: a method on a model and data, with everything that decides its outcome."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="name of the run folder; default: the file's name"
    )
    title: str = Field(description="how figures and tables call this run; default: the name")
    method: Literal["dpo", "epsilon_dpo"] = Field(description="which objective to train")
    seed: Annotated[int, Field(ge=0)] = Field(42, description="seed of data order, sampling and evaluation")
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    train: dict[str, Any] = Field(description="keys of EpsilonDPOConfig (which has all of TRL's DPOConfig)")
    evaluate: EvaluateSection | None = Field(None, description="null skips the evaluation stage")

    @field_validator("train")
    @classmethod
    def _with_global_batch(cls, train: dict[str, Any]) -> dict[str, Any]:
        """Without it the batch would grow with the number of processes, and with it the result."""
        return {"global_batch_size": GLOBAL_BATCH_SIZE, **train}

    @model_validator(mode="after")
    def _sections_agree(self) -> Experiment:
        if self.model.name_or_path == WORLD and self.data.source != WORLD:
            raise ValueError(
                f"model.name_or_path is 'world' but data.source is {self.data.source!r}: the world's model knows only "
                "the world's words. Name a model, or use data.source: world"
            )
        if self.evaluate is not None and self.data.source != WORLD:
            raise ValueError(
                f"evaluate: only the embedded world has a judge so far, and data.source is {self.data.source!r}. "
                "Remove the evaluate section"
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

    @property
    def max_length(self) -> int | None:
        """Longest prompt and completion together, in tokens: `train.max_length`, or TRL's default."""
        from epsdpo.config import EpsilonDPOConfig

        return self.train.get("max_length", EpsilonDPOConfig.max_length)

    def training_arguments(self) -> dict[str, Any]:
        """The keyword arguments of `EpsilonDPOConfig` for this run, except `output_dir`.

        Plain DPO is ε-DPO with steps of size 0: β stays where it is, while the record still shows which pairs the
        criterion would have moved (the measurement behind the paper's Figure 4a).
        """
        arguments = {**self.train, "seed": self.seed}
        if self.method == "dpo":
            arguments["epsilon_step"] = 0.0
        return arguments


def load_experiment(path: str | Path) -> Experiment:
    """Read one YAML config and check it completely.

    Raises:
        ConfigError: naming file, key, value and remedy, for a missing file, bad YAML, an unknown or mistyped key, or
            values that the trainer's own config refuses.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(values).__name__}")
    values.setdefault("name", path.stem)
    return check_experiment(values, where=str(path))


def check_experiment(values: dict[str, Any], where: str) -> Experiment:
    """Build an `Experiment` from plain values, e.g. of a YAML file; `where` begins every error message."""
    values = dict(values)
    values.setdefault("title", values.get("name"))
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(problem)}" for problem in error.errors())) from None
    _check_train_section(experiment, where)
    return experiment


def load_experiments(path: str | Path) -> list[Experiment]:
    """Read one YAML file, or every `*.yaml` of a folder in the order of their names.

    Raises:
        ConfigError: if the folder holds no config, a config is wrong (all problems of all files are listed), or two
            files claim one name.
    """
    path = Path(path)
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"{path}: the folder holds no *.yaml config")
    experiments, problems = [], []
    for file in files:
        try:
            experiments.append(load_experiment(file))
        except ConfigError as error:
            problems.append(str(error))
    # Folders go by name, tables and figures by title: of two runs that share one, one would be lost.
    shared_names = _shared(experiment.name for experiment in experiments)
    # Titles default to names, so shared names would be listed twice.
    shared_titles = {} if shared_names else _shared(experiment.title for experiment in experiments)
    problems += [
        f"{path}: {n} configs are named {name!r}; give each its own `name`" for name, n in shared_names.items()
    ]
    problems += [f"{path}: {n} configs are titled {t!r}; give each its own `title`" for t, n in shared_titles.items()]
    if problems:
        raise ConfigError("\n".join(problems))
    return experiments


def _shared(values: Iterable[str]) -> dict[str, int]:
    return {value: count for value, count in sorted(Counter(values).items()) if count > 1}


def save_experiment(experiment: Experiment, path: str | Path) -> None:
    """Write the resolved config, defaults included, as YAML that `load_experiment` reads back to an equal object."""
    text = yaml.safe_dump(experiment.model_dump(), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def claim_folder(
    experiment: Experiment, folder: str | Path, pin: Callable[[ModelSection], ModelSection] | None = None
) -> Experiment:
    """Make `folder` the place of this experiment, and return the experiment as its config file there states it.

    Results of one config are never mixed with those of another: a folder is refused once it holds a different one.

    Args:
        pin: replaces a model revision that may move by the commit it stands for; asked only for a new folder.

    Raises:
        ConfigError: if the folder holds another config, naming the keys that differ and the remedy.
    """
    path = Path(folder) / EXPERIMENT_FILE
    if path.exists():
        claimed = load_experiment(path)
        if experiment.model.revision is None:
            model = experiment.model.model_copy(update={"revision": claimed.model.revision})
            experiment = experiment.model_copy(update={"model": model})
        old, new = _flatten(claimed.model_dump()), _flatten(experiment.model_dump())
        changes = [
            f"{key} was {old.get(key, 'not set')!r}, is {new.get(key, 'not set')!r}"
            for key in {**old, **new}
            if (key in old, old.get(key)) != (key in new, new.get(key))
        ]
        if changes:
            raise ConfigError(
                f"{path.parent} holds results of another config ({'; '.join(changes)}). "
                "Choose another folder with --output, or delete this one"
            )
        return experiment
    if pin is not None:
        experiment = experiment.model_copy(update={"model": pin(experiment.model)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_experiment(experiment, partial)
    return experiment


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_train_section(experiment: Experiment, where: str) -> None:
    """Names and types of `train` against the dataclass fields of `EpsilonDPOConfig`."""
    import dataclasses
    from typing import get_type_hints

    from epsdpo.config import EpsilonDPOConfig

    known = {field.name for field in dataclasses.fields(EpsilonDPOConfig) if field.init}
    types = get_type_hints(EpsilonDPOConfig)
    problems = []
    for key, value in experiment.train.items():
        if key in _STATED_ELSEWHERE:
            problems.append(f"train.{key} belongs elsewhere: {_STATED_ELSEWHERE[key]}")
        elif key not in known:
            problems.append(f"train.{key} is unknown{_nearest(key, known)}")
        else:
            try:
                TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(
                    value, strict=True
                )
            except ValidationError as error:
                problems.append(_explain({**error.errors()[0], "loc": ("train", key), "input": value}))
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))


_EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


def _explain(problem: dict[str, Any]) -> str:
    """One line for one pydantic problem: key, value, remedy."""
    key = ".".join(str(part) for part in problem["loc"])
    value, kind = problem.get("input"), problem["type"]
    if kind == "extra_forbidden":
        return f"{key} is unknown{_nearest(str(problem['loc'][-1]), _keys_beside(problem['loc']))}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if isinstance(value, str) and _EXPONENT_WITHOUT_POINT.fullmatch(value):
        mantissa, exponent = re.split("[eE]", value)
        return (
            f"{key} is the text {value!r}, not a number: YAML reads an exponent only after a decimal point. "
            f"Write {mantissa}.0e{exponent}"
        )
    return f"{key} is {value!r} ({type(value).__name__}): {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _keys_beside(location: tuple) -> set[str]:
    """The keys that the section of a misspelt key does know."""
    section: type[BaseModel] = Experiment
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        section = next(
            kind
            for kind in (annotation, *getattr(annotation, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        )
    return set(section.model_fields)


def _nearest(name: str, known: set[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known keys: {', '.join(sorted(known)[:40])}"
