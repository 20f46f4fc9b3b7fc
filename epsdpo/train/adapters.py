"""LoRA adapters: from the config's section to PEFT's, and from a trained adapter to a model that needs no PEFT.

Nobody behind training has to know of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from epsdpo.experiment import ConfigError, Experiment, LoraSection
from epsdpo.methods.loading import empty_model, load_causal_lm, read_config
from epsdpo.models.start import load_tokenizer, start_of

_SHOWN = 160  # characters of what PEFT says, which may print whole modules


def lora_config(section: LoraSection | None) -> LoraConfig | None:
    """The settings of the adapters as PEFT takes them; None where all weights are trained."""
    if section is None:
        return None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
    )


def require_mergeable(experiment: Experiment) -> None:
    """`check_adapters` for the model that an experiment starts from, by its config.json alone."""
    if experiment.model.lora is not None:
        source, revision = start_of(experiment)
        check_adapters(read_config(source, revision), experiment.model.lora)


def check_adapters(config: PretrainedConfig, section: LoraSection) -> None:
    """Refuse adapters that the model cannot have, that would not be trained, or whose merging makes another model.

    Merged into a weight that two layers share (an embedding tied to the output head), the adapter of one would change
    the other as well. It needs no weights: the model is built without any.

    Raises:
        ConfigError: naming the value of `model.lora.target_modules`, the layer, and layers that can be named instead.
    """
    model = empty_model(config)
    layers = dict(model.named_modules())
    head = next((name for name, layer in layers.items() if layer is model.get_output_embeddings()), None)
    users: dict[int, list[str]] = {}  # the layers that have a weight, by its identity
    for name, layer in layers.items():
        for weight in layer.parameters(recurse=False):
            users.setdefault(id(weight), []).append(name)
    linear = sorted({name.rpartition(".")[2] for name in _adapted(model, LoraSection())})
    chosen = section.target_modules

    def refusal(problem: str) -> ConfigError:
        return ConfigError(
            f"model.lora.target_modules is {chosen!r}: {problem}. Name layers among {', '.join(linear)}, or "
            "'all-linear', which is all of these"
        )

    try:
        adapted = _adapted(empty_model(config), section)
    except ValueError as error:
        said = " ".join(str(error).split())
        if "not supported" in said:
            raise refusal(f"a layer of it cannot have an adapter ({said[:_SHOWN]}…)") from error
        raise refusal("it matches no layer of the model") from error
    for name in chosen if isinstance(chosen, list) else ():
        if not any(layer == name or layer.endswith(f".{name}") for layer in adapted):
            raise refusal(f"{name!r} matches no layer of the model")
    if head in adapted:
        raise refusal(f"{head} is the output head, which is used as it is, so that its adapter would not be trained")
    for name in adapted:
        sharing = {user for weight in layers[name].parameters(recurse=False) for user in users[id(weight)]} - {name}
        if sharing:
            raise refusal(
                f"{name} shares its weight with {', '.join(sorted(sharing))} (tied embeddings), which merging its "
                "adapter would change as well"
            )


def _adapted(model: torch.nn.Module, section: LoraSection) -> Collection[str]:
    """Names of the layers that get an adapter, by PEFT's own rules. Raises ValueError where PEFT finds none."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return get_peft_model(model, lora_config(section)).base_model.targeted_module_names


def merge_adapter(experiment: Experiment, adapter_dir: Path, output_dir: Path) -> None:
    """Write the starting model with a trained adapter added to its weights, and the tokenizer, into `output_dir`.

    The sum is rounded to `model.dtype`, on the CPU of one process.
    """
    unset_hf_deepspeed_config()  # training is over; under ZeRO-3 the model would be loaded in shares
    source, revision = start_of(experiment)
    base = load_causal_lm(source, revision, dtype=getattr(torch, experiment.model.dtype))
    model = PeftModel.from_pretrained(base, adapter_dir, trust_remote_code=False)
    model.merge_and_unload().save_pretrained(output_dir)
    load_tokenizer(experiment).save_pretrained(output_dir)
