"""Training as it would start: the trainer's arguments, how the batch is split, and how much memory it will take.

Only the model's config.json is read, where it is a local folder or in the hub's cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from transformers import PretrainedConfig

from epsdpo.batch.check.findings import ERROR, NOTE, OK, WARNING, Finding
from epsdpo.experiment import WORLD, ConfigError, Experiment
from epsdpo.experiment.validate import arguments_for_no_machine
from epsdpo.methods.loading import read_config
from epsdpo.methods.method_config import HALF_PRECISION, ON_A_CPU, MethodConfig, accumulation_steps, has_accelerator
from epsdpo.models.gguf import as_folder
from epsdpo.train.adapters import check_adapters, lora_config
from epsdpo.train.memory import ModelShape, Setting, Sharding, estimate_memory

_GIB = 2**30
_KINDS = {"DDP": "whole copies (DDP)", "FSDP": "shares (FSDP2)", "ZeRO-3": "shares (ZeRO-3)"}


def check_training(experiment: Experiment, processes: int) -> Iterator[Finding]:
    """Findings on arguments, batch, precision and memory of a run of so many processes."""
    try:
        with warnings.catch_warnings(action="ignore"):
            arguments = arguments_for_no_machine(experiment)
    except ValueError as error:
        yield Finding(ERROR, f"train: {' '.join(str(error).split())}")
        return
    # The class made for no machine has the method's own as its base.
    yield Finding(OK, f"train: {type(arguments).__base__.__name__} takes all {len(experiment.train)} keys")
    batch = _batch(arguments, processes)
    yield batch
    yield from _precision(experiment, processes)
    yield from _device(experiment, arguments)
    config = _model_config(experiment)
    if config is not None and experiment.model.lora is not None:
        try:
            check_adapters(config, experiment.model.lora)
        except ConfigError as error:
            yield Finding(ERROR, str(error))
            return
    if batch.level == OK:
        yield _memory(experiment, config, arguments, processes)


def _batch(arguments: MethodConfig, processes: int) -> Finding:
    batch, pairs = arguments.global_batch_size, arguments.per_device_train_batch_size // arguments.rows_per_pair
    try:
        passes = accumulation_steps(batch, pairs, processes)
    except ValueError as error:
        return Finding(ERROR, f"train.{error}")
    return Finding(
        OK,
        f"batch: {batch} pairs = {_count(processes, 'process')} × {_count(pairs, 'pair')} × {_count(passes, 'pass')}",
    )


def _precision(experiment: Experiment, processes: int) -> Iterator[Finding]:
    if experiment.model.dtype != "float32" and experiment.model.lora is None:
        yield Finding(
            WARNING if processes == 1 else NOTE,
            f"model.dtype is {experiment.model.dtype}: one process, or DDP, trains weights of that precision, in which "
            "the small steps of fine-tuning mostly round to nothing. Launch with FSDP2 or "
            "DeepSpeed, which keep float32, or set model.dtype: float32",
        )


def _device(experiment: Experiment, arguments: MethodConfig) -> Iterator[Finding]:
    """Whether half precision would be refused on this machine, which need not be the one that trains."""
    wanted = [f"train.{key}" for key in HALF_PRECISION if getattr(arguments, key)]
    wanted += ["model.sft.bf16"] if experiment.model.sft is not None and experiment.model.sft.bf16 else []
    if experiment.train.get("use_cpu") and arguments.fp16:
        yield Finding(ERROR, f"train.fp16: train.use_cpu is true, and a CPU has no float16. {ON_A_CPU}")
    if wanted and not experiment.train.get("use_cpu") and not has_accelerator():
        yield Finding(
            WARNING,
            f"{', '.join(wanted)}: there is no GPU here, and a run on this machine would be refused. {ON_A_CPU}",
        )


def _model_config(experiment: Experiment) -> PretrainedConfig | None:
    if experiment.model.name_or_path == WORLD:
        # Private there because the world's sources decide what its cache is good for, names included.
        from epsdpo.world.language import build_tokenizer
        from epsdpo.world.model import SftSettings, _architecture

        return _architecture(SftSettings(), build_tokenizer())
    return local_config(experiment.model.name_or_path, experiment.model.revision)


def _memory(
    experiment: Experiment, config: PretrainedConfig | None, arguments: MethodConfig, processes: int
) -> Finding:
    name = experiment.model.name_or_path
    if name == WORLD:
        return Finding(OK, "memory: the embedded model has a million weights and fits everywhere")
    if config is None:
        return Finding(NOTE, f"memory: not estimated: config.json of {name} is neither a file nor in the hub's cache")
    shape = ModelShape.of(config, lora_config(experiment.model.lora))
    kinds = _KINDS if processes > 1 else {"none": "one process"}
    if experiment.method == "tr_dpo":
        kinds = {kind: words for kind, words in kinds.items() if kind != "ZeRO-3"}
    peaks = []
    for kind, words in kinds.items():
        setting = Setting.of_arguments(
            shape,
            arguments,
            tokens=arguments.max_length,
            completion_tokens=arguments.max_length,
            device="cpu" if experiment.train.get("use_cpu") else "cuda",
            sharding=Sharding(kind, processes),
        )
        peaks.append(f"{estimate_memory(setting).peak / _GIB:.1f} GiB {words}")
    return Finding(
        OK,
        f"memory: with pairs of {arguments.max_length} tokens each process takes about {', '.join(peaks)}, by estimate",
    )


def local_config(name: str, revision: str | None) -> PretrainedConfig | None:
    """A model's config, if it is here."""
    try:
        return read_config(*as_folder(name, revision), local_files_only=True)
    except Exception:  # what is wrong with a local one is said by `sources`
        return None


def _count(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"
