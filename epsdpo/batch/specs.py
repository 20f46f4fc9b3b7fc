"""What each stage of an experiment is: its folder in the run, its notebook's parameters, its settings, what it needs.

This module also names the folders that several experiments share. Which stages a batch has is decided in
`epsdpo.batch.plan`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epsdpo.experiment import EXPERIMENT_FILE, Experiment
from epsdpo.runs.fingerprint import settings_of
from epsdpo.runs.layout import ANSWERS

REPORT, CLAIMS, PRECISION = "report", "claims", "precision"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a batch.

    Attributes:
        name: "<folder in the run>/<stage>".
        experiment: the experiment that it belongs to; None for what several share.
        settings: what of the experiment decides its result.
        needs: role -> name of the stage whose result it reads.
    """

    name: str
    stage: str
    folder: Path
    experiment: str | None
    parameters: dict[str, Any]
    settings: dict[str, Any]
    needs: dict[str, str] = field(default_factory=dict)


class Place:
    """Where an experiment lies in its run, with what it shares with others."""

    def __init__(self, experiment: Experiment, run_dir: Path):
        self.experiment = experiment
        self.run_dir = run_dir
        self.own = run_dir / experiment.name
        self.config = str(self.own / EXPERIMENT_FILE)
        self.data = run_dir / data_folder(experiment)
        self.pairs = run_dir / pairs_folder(experiment) if experiment.data.on_policy else None
        self.sft = run_dir / sft_folder(experiment) if experiment.model.sft else None

    def sft_dir(self) -> dict[str, str]:
        """The parameter of the stages that start from the SFT model."""
        return {"sft_dir": str(self.sft)} if self.sft else {}

    def needs_sft(self) -> dict[str, str]:
        return {"sft": f"{self.sft.name}/sft"} if self.sft else {}


def sample_stage(place: Place) -> PlannedStage:
    return PlannedStage(
        name=f"{place.pairs.name}/sample",
        stage="sample",
        folder=place.pairs,
        experiment=None,
        parameters={"config": place.config},
        settings=settings_of("sample", place.experiment),
    )


def prepare_stage(place: Place) -> PlannedStage:
    return PlannedStage(
        name=f"{place.data.name}/prepare",
        stage="prepare",
        folder=place.data,
        experiment=None,
        parameters={"config": place.config} | ({"pairs_dir": str(place.pairs)} if place.pairs else {}),
        settings=settings_of("prepare", place.experiment),
        needs={"pairs": f"{place.pairs.name}/sample"} if place.pairs else {},
    )


def sft_stage(place: Place, launch: dict[str, Any]) -> PlannedStage:
    return PlannedStage(
        name=f"{place.sft.name}/sft",
        stage="sft",
        folder=place.sft,
        experiment=None,
        parameters={"config": place.config, "data_dir": str(place.data), "live": False, **launch},
        settings=settings_of("sft", place.experiment),
        needs={"data": f"{place.data.name}/prepare"},
    )


def train_stage(place: Place, launch: dict[str, Any]) -> PlannedStage:
    return PlannedStage(
        name=f"{place.own.name}/train",
        stage="train",
        folder=place.own / "train",
        experiment=place.experiment.name,
        parameters={
            "config": place.config,
            "data_dir": str(place.data),
            **place.sft_dir(),
            "live": False,
            **launch,
        },
        settings=settings_of("train", place.experiment),
        needs={"data": f"{place.data.name}/prepare", **place.needs_sft()},
    )


def trajectory_stage(place: Place, baseline: Experiment) -> PlannedStage:
    experiment, run_dir = place.experiment, place.run_dir
    compared = baseline is not experiment
    return PlannedStage(
        name=f"{experiment.name}/trajectory",
        stage="trajectory",
        folder=place.own / "trajectory",
        experiment=experiment.name,
        parameters={
            "train_dir": str(place.own / "train"),
            "compare_with": str(run_dir / baseline.name / "train") if compared else "",
            "data_dir": str(place.data),
        },
        settings={"title": experiment.title, "baseline": baseline.title if compared else None},
        needs={"data": f"{place.data.name}/prepare", "train": f"{experiment.name}/train"}
        | ({"baseline": f"{baseline.name}/train"} if compared else {}),
    )


def evaluate_stage(place: Place) -> PlannedStage:
    return PlannedStage(
        name=f"{place.own.name}/evaluate",
        stage="evaluate",
        folder=place.own / "evaluate",
        experiment=place.experiment.name,
        parameters={
            "config": place.config,
            "data_dir": str(place.data),
            **place.sft_dir(),
            "train_dir": str(place.own / "train"),
            # Beside the stage's folder, which makes way when it is outdated: what was paid for stays.
            "keep_answers_in": str(place.own / ANSWERS),
        },
        settings=settings_of("evaluate", place.experiment),
        needs={
            "data": f"{place.data.name}/prepare",
            **place.needs_sft(),
            "train": f"{place.own.name}/train",
        },
    )


def report_stage(run_dir: Path, shown: list[str], titles: dict[str, str]) -> PlannedStage:
    return PlannedStage(
        name=f"{REPORT}/report",
        stage="report",
        folder=run_dir / REPORT,
        experiment=None,
        parameters={"run_dir": str(run_dir), "links_from": str(run_dir / REPORT)},
        settings={"titles": titles},
        needs={name: name for name in shown},
    )


def claims_stage(run_dir: Path, tested: list[str], decisive: dict[str, Any]) -> PlannedStage:
    """What tests the claims that `run_dir` was given, on the stages `tested`."""
    return PlannedStage(
        name=f"{CLAIMS}/claims",
        stage="claims",
        folder=run_dir / CLAIMS,
        experiment=None,
        parameters={"run_dir": str(run_dir)},
        settings=decisive,
        needs={name: name for name in tested},
    )


def precision_stage(run_dir: Path, compared: list[str]) -> PlannedStage:
    """What the precision of the criterion did in the runs `compared`."""
    return PlannedStage(
        name=f"{PRECISION}/precision",
        stage="precision",
        folder=run_dir / PRECISION,
        experiment=None,
        parameters={"run_dir": str(run_dir)},
        settings={},
        needs={name: name for name in compared},
    )


def pairs_folder(experiment: Experiment) -> str:
    """Name of the folder of sampled pairs: experiments whose pairs would come out the same share one."""
    return _shared_folder("pairs", "sample", experiment)


def data_folder(experiment: Experiment) -> str:
    """Name of the prepared-data folder, shared as that of pairs."""
    return _shared_folder("data", "prepare", experiment)


def sft_folder(experiment: Experiment) -> str:
    """Name of the SFT model's folder, shared as that of pairs."""
    return _shared_folder("sft", "sft", experiment)


def _shared_folder(kind: str, stage: str, experiment: Experiment) -> str:
    decisive = json.dumps(settings_of(stage, experiment), sort_keys=True)
    return f"{kind}-" + hashlib.sha256(decisive.encode()).hexdigest()[:8]
