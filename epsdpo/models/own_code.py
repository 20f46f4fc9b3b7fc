"""Models that a config names and that cannot be loaded without running code of their own: found before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from epsdpo.experiment import WORLD, ConfigError, Experiment
from epsdpo.methods.loading import AS_NAMED, CAUSAL_LM, CLASSIFIER, OwnCodeError, needs_own_code

_JUDGES = {"causal_lm": CAUSAL_LM, "reward_model": CLASSIFIER, "pair_ranker": None}


class _Named(NamedTuple):
    """A model that a config names, and what it is loaded as."""

    section: str
    source: str
    revision: str | None
    kind: str | None


def own_code(experiment: Experiment) -> list[str]:
    """A sentence for each model and tokenizer of a config that is here and cannot be loaded without its own code."""
    return [
        f"{section}: {OwnCodeError(source)}"
        for section, source, revision, kind in _named(experiment)
        if needs_own_code(source, revision, kind)
    ]


def require_no_own_code(experiments: Iterable[Experiment], folders: Iterable[Path] = ()) -> None:
    """Refuse what could not be loaded, before any work.

    Args:
        folders: of trained models, which the experiments do not name.

    Raises:
        ConfigError: naming each section, folder and the remedy.
    """
    problems = [problem for experiment in experiments for problem in own_code(experiment)]
    problems += [str(OwnCodeError(str(folder))) for folder in folders if needs_own_code(str(folder), None, AS_NAMED)]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _named(experiment: Experiment) -> Iterator[_Named]:
    model, sampled, evaluate = experiment.model, experiment.data.on_policy, experiment.evaluate
    if model.name_or_path != WORLD:
        yield _Named("model.name_or_path", model.name_or_path, model.revision, AS_NAMED)
    if model.chat_template is not None and not model.chat_template.endswith(".jinja"):
        source, _, revision = model.chat_template.partition("@")
        yield _Named("model.chat_template", source, revision or None, None)
    if sampled is not None and sampled.ranker.model != WORLD:
        yield _Named("data.on_policy.ranker.model", sampled.ranker.model, sampled.ranker.revision, CLASSIFIER)
    judge = None if evaluate is None else evaluate.judge
    if judge is not None and judge.kind in _JUDGES:
        yield _Named("evaluate.judge.model", judge.model, judge.revision, _JUDGES[judge.kind])
