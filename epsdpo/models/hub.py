"""Which commit a hub repository stands at. What to say when the hub cannot be asked is left to the caller."""

import os
import re

from epsdpo.models.api_key import require_sendable

COMMIT = re.compile(r"[0-9a-f]{40}")


def commit_of(repository: str, revision: str | None, repo_type: str) -> str:
    """The commit that a branch, tag, commit or (None) the default branch stands for now; a commit is not asked about.

    Args:
        repo_type: "model" or "dataset".

    Raises:
        Exception: whatever the HTTP client behind huggingface_hub raises, which changes from release to release.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    # Of line breaks the hub's client rids it itself.
    require_sendable("".join(os.environ.get("HF_TOKEN", "").split()), "the environment variable HF_TOKEN")
    from huggingface_hub import HfApi

    return HfApi().repo_info(repository, revision=revision, repo_type=repo_type).sha
