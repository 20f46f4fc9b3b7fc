"""A judge's model and tokenizer through transformers, and a name for its weights that no other weights have.

This module knows loading and identity. What the model is asked is left to the judges that run here.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from epsdpo.evaluation.judges.comparison import JudgeError
from epsdpo.experiment import RankerSection
from epsdpo.experiment.sections.judge import JudgeSection
from epsdpo.methods.chat_template import draws_at_random
from epsdpo.methods.loading import OwnCodeError, load_model, read_tokenizer
from epsdpo.models.hub import commit_of

_PARTS_OF_A_MODEL = {".json", ".jinja", ".model", ".safetensors", ".txt"}


def load_judge_model(
    model_class: Any, settings: JudgeSection | RankerSection, section: str = "evaluate.judge"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Model on the GPU if there is one, tokenizer, and `weights_name` of the two.

    Args:
        model_class: whose `from_pretrained` loads the model, e.g. AutoModelForCausalLM.
        settings: model, revision and dtype.
        section: where a config states them, for messages.

    Raises:
        JudgeError: if it cannot be loaded, its chat template draws at random, or the checkpoint lacks weights of this
            class, which would be random.
    """
    name = weights_name(settings.model, settings.revision, section)
    revision = None if Path(settings.model).is_dir() else name.rpartition("@")[2]
    try:
        model, loading = load_model(
            settings.model,
            model_class,
            revision=revision,
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = read_tokenizer(settings.model, revision)
    except OwnCodeError as error:
        raise JudgeError(f"{section}.model: {error}") from error
    except (OSError, ValueError) as error:
        raise JudgeError(
            f"{section}.model: cannot load {settings.model!r} as {model_class.__name__}: {error}\n"
            "Check the name, log in to the hub if the model is gated, or give the path of a local copy"
        ) from error
    if missing := sorted(loading["missing_keys"]):
        raise JudgeError(
            f"{section}.model: {settings.model!r} has no {', '.join(missing[:3])}, so as {model_class.__name__} "
            f"it would judge by random numbers. Name a model of this kind"
            f"{', or change evaluate.judge.kind' if section == 'evaluate.judge' else ''}"
        )
    if draws_at_random(tokenizer):
        raise JudgeError(
            f"{section}.model: the chat template of {settings.model!r} draws at random, so that it would judge the "
            "same texts otherwise each time. Name a local copy without that"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, name


def weights_name(model: str, revision: str | None, section: str = "evaluate.judge") -> str:
    """A hub model's name and commit; for a local folder a hash of its files, wherever it lies.

    Raises:
        JudgeError: if the hub cannot be asked for the commit.
    """
    if Path(model).is_dir():
        return f"sha256:{_digest_of_folder(Path(model))}"
    try:
        return f"{model}@{commit_of(model, revision, 'model')}"
    except Exception as error:  # see `commit_of`
        raise JudgeError(
            f"{section}.model: {model!r} is no local folder, and the hub cannot be asked which commit it stands "
            f"at ({type(error).__name__}). Give {section}.revision as a full commit, or the path of a local copy"
        ) from error


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, where its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _PARTS_OF_A_MODEL:
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
