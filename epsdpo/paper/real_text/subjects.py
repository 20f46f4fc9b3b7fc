"""Which policies of a run folder are measured, and on which pairs: several distances from the reference, same pairs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from epsdpo.data.prepared import load_prepared
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.methods.config import EpsilonDPOConfig
from epsdpo.models.start import after_sft
from epsdpo.paper.epsilon_bound import measured_pairs, policies_of
from epsdpo.paper.precision.policies import beside
from epsdpo.paper.precision.recipes import METHODS
from epsdpo.report.collect import collect
from epsdpo.runs.manifest import read_manifest
from epsdpo.train.preferences import trainer_arguments

PAIRS = 208


@dataclass(frozen=True)
class Policy:
    """A model that training came to.

    Attributes:
        name: of its experiment and step; names its files.
        run: title of its experiment.
        step: the optimiser step after which it was kept.
        folder: its weights.
    """

    name: str
    run: str
    step: int
    folder: Path


@dataclass(frozen=True)
class Subject:
    """A finished run: what its policies are measured with.

    Attributes:
        experiment: after its SFT, if it has one; its start is the reference.
        training: key of its training.
        arguments: of its trainer, for device, length and precision.
        pairs: rows of prepared data, the shortest first.
        policies: after few, some and many steps, of those that it kept.
    """

    experiment: Experiment
    training: str
    arguments: EpsilonDPOConfig
    pairs: Dataset
    policies: list[Policy]

    @property
    def reference(self) -> str:
        """What tells reference and pairs from those of other runs."""
        model = self.experiment.model.model_dump_json()
        return f"{model} {self.arguments.max_length} {self.arguments.bf16} {self.arguments.fp16} {self.digest}"

    @property
    def digest(self) -> str:
        """Of the pairs as the models read them."""
        columns = [self.pairs[name] for name in ("pair_id", "prompt_ids", "chosen_ids", "rejected_ids")]
        return hashlib.sha256(json.dumps([list(column) for column in columns]).encode()).hexdigest()


def subjects_of(run_dir: Path) -> list[Subject]:
    """The finished runs of DPO and ε-DPO in a run folder, which have one reference throughout.

    Raises:
        ConfigError: if there is none.
    """
    subjects = []
    for run in collect(run_dir)[0]:
        train_dir = run.directory / "train"
        manifest = read_manifest(train_dir)
        if manifest is None or run.experiment.method not in METHODS or run.experiment.model.lora is not None:
            continue
        data = load_prepared(beside(run, manifest["parameters"]["data_dir"]))
        sft_dir = manifest["parameters"].get("sft_dir", "")
        experiment = after_sft(run.experiment, sft_dir and beside(run, sft_dir))
        pairs = measured_pairs(data, PAIRS)
        kept = policies_of(train_dir)
        policies = [
            Policy(f"{run.experiment.name}-step{step}", run.experiment.title, step, kept[step])
            for step in few_some_many(sorted(kept))
        ]
        arguments = trainer_arguments(experiment, data, train_dir)
        subjects.append(Subject(experiment, manifest["key"], arguments, _shortest_first(pairs), policies))
    if not subjects:
        raise ConfigError(
            f"{run_dir} has no finished run of DPO or ε-DPO without model.lora: there is no policy to measure"
        )
    return subjects


def few_some_many(steps: Sequence[int]) -> list[int]:
    """Three of the steps at most: the first, the last, and the one that is as many times the first as the last of it.

    Args:
        steps: increasing, above 0.
    """
    if len(steps) <= 3:
        return list(steps)
    middle = math.sqrt(steps[0] * steps[-1])
    some = min(steps[1:-1], key=lambda step: abs(math.log(step / middle)))
    return [steps[0], some, steps[-1]]


def _shortest_first(pairs: Dataset) -> Dataset:
    """In this order a batch has little padding."""
    parts = zip(*(pairs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in parts]
    return pairs.select(np.argsort(lengths, kind="stable"))
