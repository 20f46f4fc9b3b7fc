"""Which weights and tokenizer an experiment starts from, and which weights a folder or hub model is.

It knows the embedded world, local folders and pinned hub models. Training and evaluation both ask here, so that the
reference of one is the reference of the other.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from epsdpo.experiment import WORLD, ConfigError, DataSection, ModelSection
from epsdpo.hub import commit_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What decides what a model in a folder says, among what else may lie there.
_DECISIVE_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_NOT_DECISIVE = ("training_args.bin", "trainer_state.json")


def reference_source(model: ModelSection, data: DataSection) -> tuple[str, str | None]:
    """Where the reference (and the policy before training) is loaded from: a folder or hub id, and its revision."""
    if model.name_or_path == WORLD:
        from epsdpo.world import reference_model_dir

        return str(reference_model_dir(data.world)), None
    return model.name_or_path, model.revision


def load_tokenizer(model: ModelSection, data: DataSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with its chat template, of the model that an experiment starts from.

    Raises:
        ConfigError: if it cannot be loaded, naming the model and what to try.
    """
    from transformers import AutoTokenizer  # late, for those who only ask for a revision

    source, revision = reference_source(model, data)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name_or_path: cannot load the tokenizer of {source!r}"
            f"{f' at revision {revision}' if revision else ''}: {error}\n"
            "Check the name, log in to the hub if the model is gated, or give the path of a local copy"
        ) from error


def pin_revision(model: ModelSection) -> ModelSection:
    """The same section with the commit that a hub model's branch, tag or missing revision stands for today.

    Raises:
        ConfigError: if the hub cannot be asked.
    """
    if model.name_or_path == WORLD or Path(model.name_or_path).exists():
        return model
    try:
        commit = commit_of(model.name_or_path, model.revision, "model")
    except Exception as error:  # see `commit_of`
        raise ConfigError(
            f"model.name_or_path: {model.name_or_path!r} is no local folder, and the hub cannot be asked which commit "
            f"it stands at ({type(error).__name__}: {str(error).partition(chr(10))[0]}). Give model.revision as a full "
            "commit, or the path of a local copy"
        ) from error
    return model.model_copy(update={"revision": commit})


def model_identity(source: str, revision: str | None) -> dict[str, str]:
    """What tells a model from every other, wherever it lies: a digest of a folder's files, or a hub id with its commit.

    It reads a folder whole: about a second per GB.

    Raises:
        OSError: if neither the hub nor its cache has the model.
    """
    folder = Path(source)
    if folder.is_dir():
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            if file.name.endswith(_DECISIVE_SUFFIXES) and file.name not in _NOT_DECISIVE:
                with file.open("rb") as content:
                    digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
        return {"model": "local", "digest": digest.hexdigest()}
    from huggingface_hub import hf_hub_download

    # The cache keeps files in a folder per commit, and answers offline too.
    commit = Path(hf_hub_download(source, "config.json", revision=revision)).parent.name
    return {"model": source, "revision": commit}
