"""Models, their configs and tokenizers by transformers, from folders and the hub, and never any code from there.

A model may come with Python of its own. transformers runs it where it is told to trust it, and where it is told nothing
it asks on the terminal; here it is told not to, wherever something is loaded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epsdpo.methods.errors import ConfigError

# torch and transformers are imported late: `needs_own_code` is asked before every stage, and rarely needs them.
if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What a model is loaded as; TRL goes by the architecture that its config names. None stands for the tokenizer alone.
AS_NAMED, CAUSAL_LM, CLASSIFIER = "as named", "AutoModelForCausalLM", "AutoModelForSequenceClassification"


class OwnCodeError(ConfigError):
    """A model or tokenizer that cannot be loaded without running code of its own. The message names it."""

    def __init__(self, source: str):
        super().__init__(
            f"{source} can only be loaded by running Python code of its own, and code that comes with a model is never "
            "run here. Name a model and tokenizer of a kind that transformers has itself, or a copy converted to one"
        )


@contextmanager
def never_running_code(source: str) -> Iterator[None]:
    """A block in which transformers neither runs code that comes with a model nor asks whether to.

    Raises:
        OwnCodeError: if `source` cannot be loaded without.
    """
    from transformers import dynamic_module_utils

    # No argument reaches the models that a model makes as its parts, and of which transformers would ask. With no time
    # to wait for an answer it refuses.
    seconds, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    except OwnCodeError:
        raise
    except pickle.UnpicklingError as error:  # of weights in torch's own form, which can call anything
        raise OwnCodeError(source) from error
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise OwnCodeError(source) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def read_config(source: str | Path, revision: str | None = None, **options: Any) -> PretrainedConfig:
    """`AutoConfig.from_pretrained`. Raises `OwnCodeError`, OSError or ValueError."""
    from transformers import AutoConfig

    with never_running_code(str(source)):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **options)


def read_tokenizer(source: str | Path, revision: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`. Raises `OwnCodeError`, OSError or ValueError."""
    from transformers import AutoTokenizer

    with never_running_code(str(source)):
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **options)


def load_model(source: str | Path, model_class: Any, **options: Any) -> Any:
    """`model_class.from_pretrained`. Raises `OwnCodeError`, OSError or ValueError."""
    with never_running_code(str(source)):
        return model_class.from_pretrained(source, trust_remote_code=False, **options)


def load_causal_lm(source: str | Path, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """`load_model` of what is trained and compared here."""
    from transformers import AutoModelForCausalLM

    return load_model(source, AutoModelForCausalLM, revision=revision, **options)


def empty_model(config: PretrainedConfig, kind: str = AS_NAMED) -> PreTrainedModel:
    """The model that a config describes, on the meta device, where it has no weights.

    A model that the trainer will refuse must get as far as that refusal, so that any architecture is taken.
    """
    import torch
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None) if kind == AS_NAMED else None
    with never_running_code(config.name_or_path), torch.device("meta"):
        if named is not None:
            return named(config)
        auto_class = getattr(transformers, CAUSAL_LM if kind == AS_NAMED else kind)
        return auto_class.from_config(config, trust_remote_code=False)


def needs_own_code(source: str, revision: str | None, kind: str | None) -> bool:
    """Whether a model that is here, in a folder or in the hub's cache, or its tokenizer needs code of its own.

    What else is wrong with it is told where it is loaded.
    """
    if not any(_names_code(source, revision, file) for file in ("config.json", "tokenizer_config.json")):
        return False

    def make_model() -> None:
        if kind is not None:
            empty_model(read_config(source, revision, local_files_only=True), kind)

    for attempt in (make_model, lambda: read_tokenizer(source, revision, local_files_only=True)):
        try:
            attempt()
        except OwnCodeError:
            return True
        except Exception:  # of many kinds: the files of a folder can say anything
            continue
    return False


def _names_code(source: str, revision: str | None, name: str) -> bool:
    """Whether a file of a model names code, for itself or for one of its parts."""
    if Path(source).is_dir():
        file: Any = Path(source) / name
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            file = try_to_load_from_cache(source, name, revision=revision)
        except HFValidationError:  # neither a folder nor a name that the hub could have
            return False
    found = []
    try:
        json.loads(Path(file).read_bytes(), object_hook=lambda part: found.append("auto_map" in part))
    except (OSError, TypeError, ValueError, RecursionError):  # TypeError: not in the cache
        return False
    return any(found)
