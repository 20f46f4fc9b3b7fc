"""In which arithmetic ε-DPO would decide: by its config, in the released code under the same settings, as published."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from epsdpo.batch.check.findings import OK, WARNING, Finding
from epsdpo.experiment import Experiment
from epsdpo.experiment.keys import setting_of
from epsdpo.experiment.validate import Layers, place_of
from epsdpo.methods.launches import IN_WORDS, PUBLISHED, arithmetic_of

_KEY = ("train", "criterion_dtype")
_RECIPES = ("paper", "small")  # folders of `configs` with the experiments of the paper


def check_arithmetic(experiment: Experiment, layers: Layers) -> Iterator[Finding]:
    """A line where β follows the decisions; a warning where a recipe of the paper would follow other ones.

    Args:
        layers: what the experiment was merged from, by which it is a recipe of the paper or none.
    """
    if not experiment.beta_follows:
        return
    name = experiment.criterion()["criterion_dtype"]
    if _of_the_paper(layers) and name != PUBLISHED:
        key, where = ".".join(_KEY), place_of(_KEY, layers) if _KEY[1] in experiment.train else None
        yield Finding(
            WARNING,
            f"criterion: {IN_WORDS[name]} ({key} is {name!r}, {f'by {where}' if where else 'its default'}), where the "
            f"published launch has {IN_WORDS[PUBLISHED]}: other pairs tie, and β moves otherwise (docs/launches.md). "
            f"{key}: {PUBLISHED} restores the published algorithm",
        )
        return
    with_zero, without = (
        arithmetic_of(_mixed_precision(experiment), zero, experiment.model.dtype) for zero in (True, False)
    )
    released = IN_WORDS[without]
    if with_zero != without:
        released = f"{IN_WORDS[with_zero]} under DeepSpeed ZeRO, {released} elsewhere"
    yield Finding(OK, f"criterion: {IN_WORDS[name]}; the released code with these settings: {released}")


def _of_the_paper(layers: Layers) -> bool:
    """Whether a config lies in, or extends one of, the folders of the paper's recipes."""
    files = [Path(place).resolve() for place, _ in layers if Path(place).is_file()]
    folders = [folder for file in files for folder in file.parents]
    return any(folder.name in _RECIPES and folder.parent.name == "configs" for folder in folders)


def _mixed_precision(experiment: Experiment) -> str:
    if setting_of(experiment, "fp16"):
        return "fp16"
    return "no" if setting_of(experiment, "bf16") is False else "bf16"  # which TRL takes where nothing is said
