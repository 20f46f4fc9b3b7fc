"""Models and data sets of a config: whether their revisions are pinned, and who has to ask for access.

Names and local folders are looked at, and no hub is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from epsdpo.batch.check.findings import ERROR, NOTE, OK, WARNING, Finding
from epsdpo.experiment import WORLD, Experiment
from epsdpo.experiment.paths import looks_local
from epsdpo.models.hub import COMMIT
from epsdpo.models.local_models import gguf_facts, local_problems

# Publishers whose models are given out on conditions that each user has to accept on the hub.
_GATED = ("meta-llama/", "google/gemma", "mistralai/")


def check_sources(experiment: Experiment) -> Iterator[Finding]:
    """A finding on every model and data set of the hub, and on what is local only if it cannot be used."""
    if problems := list(local_problems(experiment)):
        yield from (Finding(ERROR, problem) for problem in problems)
    else:
        for key, facts in gguf_facts(experiment).items():
            yield Finding(OK, f"{key}: {facts['file']} is {facts['content']}, {facts['weights']}")
    for section, name, revision in _named(experiment):
        kind = "dataset" if section == "data" or section.endswith("prompts") else "model"
        if not on_hub(name):
            continue
        if revision is not None and COMMIT.fullmatch(revision):
            yield Finding(OK, f"{section}: {name} is pinned at {revision}")
        else:
            yield Finding(
                WARNING,
                f"{section}: {name} is not pinned to a commit (revision {revision!r}), so it may change between two "
                f"runs. Its commit of today: "
                f'python -c "from huggingface_hub import HfApi; print(HfApi().{kind}_info({name!r}).sha)"',
            )
        if name.startswith(_GATED):
            yield Finding(
                NOTE, f"{section}: {name} is gated: accept its terms on the hub and log in with `hf auth login`"
            )


def _named(experiment: Experiment) -> Iterator[tuple[str, str, str | None]]:
    """(section, name, revision) of every model and data set that a config names."""
    model, data, evaluate = experiment.model, experiment.data, experiment.evaluate
    yield "model", model.name_or_path, model.revision
    if model.chat_template is not None:
        name, _, revision = model.chat_template.partition("@")
        yield "model.chat_template", name, revision or None
    if data.on_policy is None:
        yield "data", data.source, data.revision
    else:
        yield "data.on_policy.prompts", data.on_policy.prompts.source, data.on_policy.prompts.revision
        yield "data.on_policy.ranker", data.on_policy.ranker.model, data.on_policy.ranker.revision
    if evaluate is not None:
        yield "evaluate.prompts", evaluate.prompts.source, evaluate.prompts.revision
        if evaluate.judge is not None and evaluate.judge.kind not in ("gold", "chat"):
            yield "evaluate.judge", evaluate.judge.model, evaluate.judge.revision


def on_hub(name: str) -> bool:
    """Whether a source is neither the embedded world nor a local path."""
    path_like = looks_local(name) or Path(name).expanduser().exists()
    return name != WORLD and not path_like and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
