"""Models ready to answer or to judge, on the GPU if there is one."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epsdpo.experiment import ConfigError, ModelSection, RankerSection
from epsdpo.experiment.gguf_file import GgufError
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.chat_template import draws_at_random
from epsdpo.methods.loading import OwnCodeError, load_causal_lm, load_model, read_tokenizer
from epsdpo.models.gguf import as_folder
from epsdpo.models.hub import model_identity


def load_answering_model(model: ModelSection, source: str, revision: str | None = None) -> PreTrainedModel:
    """A causal language model in the precision of a `model` section, ready for inference."""
    loaded = load_causal_lm(
        source,
        revision=revision,
        dtype=getattr(torch, model.dtype),
        attn_implementation=model.attn_implementation,
    )
    return _placed(loaded)


def load_scoring_model(
    model_class: Any, settings: JudgeSection | RankerSection, section: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model on the GPU if there is one, tokenizer, and `weights_name` of the two.

    Args:
        model_class: whose `from_pretrained` loads the model, e.g. AutoModelForCausalLM.
        settings: model, revision and dtype.
        section: where a config states them, for messages.

    Raises:
        ConfigError: if it cannot be loaded, its chat template draws at random, or the checkpoint lacks weights of this
            class, which would be random.
    """
    try:
        source, revision = as_folder(settings.model, settings.revision)
    except GgufError as error:
        raise ConfigError(f"{section}.model: {error}") from error
    name = weights_name(source, revision, section)
    revision = None if Path(source).is_dir() else name.rpartition("@")[2]
    try:
        model, loading = load_model(
            source,
            model_class,
            revision=revision,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = read_tokenizer(source, revision)
    except OwnCodeError as error:
        raise ConfigError(f"{section}.model: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{section}.model: cannot load {settings.model!r} as {model_class.__name__}: {error}\n"
            "Check the name, log in to the hub if the model is gated, or give the path of a local copy"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"{section}.model: {settings.model!r} has no {', '.join(missing[:3])}, so as {model_class.__name__} "
            f"it would judge by random numbers. Name a model of this kind"
            f"{', or change evaluate.judge.kind' if section == 'evaluate.judge' else ''}"
        )
    if draws_at_random(tokenizer):
        raise ConfigError(
            f"{section}.model: the chat template of {settings.model!r} draws at random, so that it would judge the "
            "same texts otherwise each time. Name a local copy without that"
        )
    return _placed(model), tokenizer, name


def weights_name(model: str, revision: str | None, section: str) -> str:
    """What tells a model from every other, as a text: see `model_identity`.

    Raises:
        ConfigError: if neither the hub nor its cache has the model.
    """
    try:
        identity = model_identity(model, revision)
    except Exception as error:  # of whatever HTTP client is behind the hub's
        raise ConfigError(
            f"{section}.model: {model!r} is no local folder, and the hub cannot be asked which commit it stands "
            f"at ({type(error).__name__}). Give {section}.revision as a full commit, or the path of a local copy"
        ) from error
    return f"sha256:{identity['digest']}" if "digest" in identity else f"{model}@{identity['revision']}"


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
