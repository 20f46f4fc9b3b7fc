"""Models and data sets of a config: whether their revisions are pinned, and who has to ask for access.

It looks at names only, and asks no hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from epsdpo.checking.findings import NOTE, OK, WARNING, Finding
from epsdpo.experiment import WORLD, Experiment

# Publishers whose models are given out on conditions that each user has to accept on the hub.
_GATED = ("meta-llama/", "google/gemma", "mistralai/")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_sources(experiment: Experiment) -> Iterator[Finding]:
    """A finding on every model and data set of the hub, and on nothing that is local or embedded."""
    named = [
        ("model", experiment.model.name_or_path, experiment.model.revision),
        ("data", experiment.data.source, experiment.data.revision),
    ]
    if experiment.evaluate is not None:
        named.append(("evaluate.prompts", experiment.evaluate.prompts.source, experiment.evaluate.prompts.revision))
    for section, name, revision in named:
        if not on_hub(name):
            continue
        if revision is not None and _COMMIT.fullmatch(revision):
            yield Finding(OK, f"{section}: {name} is pinned at {revision}")
        else:
            kind = "model" if section == "model" else "dataset"
            yield Finding(
                WARNING,
                f"{section}.revision is {revision!r}, so {name} may change between two runs. Its commit of today: "
                f'python -c "from huggingface_hub import HfApi; print(HfApi().{kind}_info({name!r}).sha)"',
            )
        if name.startswith(_GATED):
            yield Finding(
                NOTE, f"{section}: {name} is gated: accept its terms on the hub and log in with `hf auth login`"
            )


def on_hub(name: str) -> bool:
    """Whether a source is neither the embedded world nor a local path."""
    return name != WORLD and not Path(name).expanduser().exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
