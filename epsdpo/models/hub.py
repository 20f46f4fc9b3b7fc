"""What tells a model or data set from every other: the commit that a hub repository stands at, a folder's digest."""

import hashlib
import os
import re
from pathlib import Path

from epsdpo.models.api_key import require_sendable

COMMIT = re.compile(r"[0-9a-f]{40}")

# What decides what a model in a folder says, among what else may lie there.
_DECISIVE_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_NOT_DECISIVE = ("training_args.bin", "trainer_state.json")


def commit_of(repository: str, revision: str | None, repo_type: str) -> str:
    """The commit that a branch, tag, commit or (None) the default branch stands for now; a commit is not asked about.

    Args:
        repo_type: "model" or "dataset".

    Raises:
        Exception: whatever the HTTP client behind huggingface_hub raises, which changes from release to release.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    # Line breaks in it are taken out by the hub's client.
    require_sendable("".join(os.environ.get("HF_TOKEN", "").split()), "the environment variable HF_TOKEN")
    from huggingface_hub import HfApi

    return HfApi().repo_info(repository, revision=revision, repo_type=repo_type).sha


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
