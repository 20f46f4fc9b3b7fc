"""What each stage is, once for the plan of a batch, for whoever runs a stage, and for its key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from epsdpo.experiment import EXPERIMENT_FILE, Experiment
from epsdpo.methods.catalogue import code_of, decided_by
from epsdpo.paper.claims.fixed import fixed_claims
from epsdpo.paper.claims.settings import Claims
from epsdpo.paper.published import PUBLISHED_FILE
from epsdpo.runs import decisive
from epsdpo.runs.layout import ANSWERS, finished_analyses, shared_folders, tested_on, titles_in, trained_in
from epsdpo.runs.manifest import TRAININGS
from epsdpo.runs.reach import DRAWING, digest, reached


class StageId(NamedTuple):
    """A stage of a batch: the folder in the run that it belongs to, and which stage it is."""

    folder: str
    stage: str

    def __str__(self) -> str:
        return f"{self.folder}/{self.stage}"


@dataclass(frozen=True)
class Spec:
    """What a stage is.

    Attributes:
        notebook: file name, in `notebooks/`.
        reads: role of an earlier stage's result -> parameter that names its folder.
        takes: its other parameters that a batch gives, see `planned_stage`.
        settings: of an experiment, what decides the result; None for a stage that is no experiment's.
        work: function of the notebook whose call makes the result, and all else only shows it; "" where what is shown
            is the result.
        joins: of a run folder, the keys of what the stage reads there, by name; None for a stage of one experiment.
        settings_of_run: of a run folder, what more decides what a stage makes that joins it. The experiments and claims
            are those of a batch that is not in the folder yet.
        of_one_experiment: whether it has its folder within the experiment's; others share theirs, or join a whole run.
        by_method: whether what it reaches depends on the experiment's method.
        on_gpu: whether it computes with models.
        alone: whether it computes for long when all else is done: it then has a machine's cores for itself.
    """

    notebook: str
    reads: Mapping[str, str] = field(default_factory=dict)
    takes: tuple[str, ...] = ()
    settings: Callable[[Experiment], dict[str, Any]] | None = None
    work: str = ""
    joins: Callable[[Path], dict[str, str]] | None = None
    settings_of_run: Callable[[Path, Iterable[Experiment], Claims | None], dict[str, Any]] | None = None
    of_one_experiment: bool = False
    by_method: bool = False
    on_gpu: bool = False
    alone: bool = False


def _titles(run_dir: Path, experiments: Iterable[Experiment], _: Claims | None) -> dict[str, Any]:
    return {"titles": titles_in(run_dir) | {experiment.name: experiment.title for experiment in experiments}}


def _report(run_dir: Path, experiments: Iterable[Experiment], claims: Claims | None) -> dict[str, Any]:
    return _titles(run_dir, experiments, claims) | _published(run_dir)


def _claims(run_dir: Path, _: Iterable[Experiment], claims: Claims | None) -> dict[str, Any]:
    return (claims or fixed_claims(run_dir)[1]).model_dump() | _published(run_dir)


def _published(run_dir: Path) -> dict[str, Any]:
    """The tables of the paper that a page puts beside the runs, where there are any."""
    path = run_dir / PUBLISHED_FILE
    return {"published": digest(path.read_bytes())} if path.exists() else {}


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


# In the order of a run; the last is run by hand alone.
STAGES = {
    "sample": Spec(
        "00_sample_pairs.ipynb",
        takes=("config", "keep_answers_in"),
        settings=decisive.of_sampling,
        work="sample_pairs",
        on_gpu=True,
    ),
    "prepare": Spec(
        "01_prepare_data.ipynb",
        reads={"pairs": "pairs_dir"},
        takes=("config",),
        settings=decisive.of_prepared_data,
        work="prepare",
    ),
    "sft": Spec(
        "01b_sft.ipynb",
        reads={"data": "data_dir"},
        takes=("config", "live"),
        settings=decisive.of_sft,
        work="finetune",
        on_gpu=True,
    ),
    "train": Spec(
        "02_train.ipynb",
        reads={"data": "data_dir", "sft": "sft_dir"},
        takes=("config", "live"),
        settings=decisive.of_training,
        work="train",
        of_one_experiment=True,
        by_method=True,
        on_gpu=True,
    ),
    "trajectory": Spec(
        "03_beta_trajectory.ipynb",
        reads={"data": "data_dir", "train": "train_dir", "baseline": "compare_with"},
        settings=lambda experiment: {"title": experiment.title},
        of_one_experiment=True,
    ),
    "evaluate": Spec(
        "04_evaluate.ipynb",
        reads={"data": "data_dir", "sft": "sft_dir", "train": "train_dir"},
        takes=("config", "keep_answers_in"),
        settings=decisive.of_evaluation,
        of_one_experiment=True,
        on_gpu=True,
    ),
    "report": Spec(
        "05_report.ipynb", takes=("run_dir", "links_from"), joins=finished_analyses, settings_of_run=_report
    ),
    "claims": Spec("06_claims.ipynb", takes=("run_dir",), joins=tested_on, settings_of_run=_claims, alone=True),
    "precision": Spec("07_precision.ipynb", takes=("run_dir",), joins=tested_on, settings_of_run=_nothing),
    "real_text": Spec("08_real_text.ipynb", takes=("run_dir",), joins=trained_in, settings_of_run=_titles, alone=True),
    "compare": Spec("03b_compare_trajectories.ipynb"),
}

# Which stage makes what others read, by its role for them.
_MADE_BY = {"pairs": "sample", "data": "prepare", "sft": "sft", "train": "train"}


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a batch.

    Attributes:
        settings: what of the experiment, or of the batch, decides its result.
        needs: role -> stage whose result it reads.
        method: of its experiment; "" where several share it.
    """

    id: StageId
    folder: Path
    parameters: dict[str, Any]
    settings: dict[str, Any]
    needs: dict[str, StageId]
    method: str = ""

    @property
    def stage(self) -> str:
        return self.id.stage


def planned_stage(
    stage: str,
    experiment: Experiment,
    run_dir: Path,
    launch: Mapping[str, Any] | None = None,
    baseline: Experiment | None = None,
) -> PlannedStage:
    """A stage of an experiment, whose folder it may share with others.

    Args:
        launch: parameters of the stages that train, which say where that is computed.
        baseline: the experiment that it is compared with.
    """
    spec, own = STAGES[stage], run_dir / experiment.name
    shared = shared_folders(experiment)
    needs = {
        role: StageId(shared.get(made_by, experiment.name), made_by)
        for role, made_by in _MADE_BY.items()
        if role in spec.reads and (made_by in shared or STAGES[made_by].of_one_experiment)
    }
    if baseline is not None:
        needs["baseline"] = StageId(baseline.name, "train")
    stage_id = StageId(experiment.name if spec.of_one_experiment else shared[stage], stage)
    values = {
        "config": str(own / EXPERIMENT_FILE),
        "live": False,
        "keep_answers_in": str(own / ANSWERS if spec.of_one_experiment else run_dir / ANSWERS / stage_id.folder),
    }
    return PlannedStage(
        stage_id,
        folder_of(stage_id, run_dir),
        {name: values[name] for name in spec.takes}
        | {spec.reads[role]: str(folder_of(need, run_dir)) for role, need in needs.items()}
        | (dict(launch or {}) if stage in TRAININGS else {}),
        settings_of(stage, experiment, baseline),
        needs,
        method=experiment.method if spec.by_method else "",
    )


def planned_over_run(
    stage: str, run_dir: Path, joined: Iterable[StageId], experiments: Iterable[Experiment], claims: Claims | None
) -> PlannedStage:
    """A stage that joins the results of others."""
    spec, stage_id = STAGES[stage], StageId(stage, stage)
    folder = folder_of(stage_id, run_dir)
    values = {"run_dir": str(run_dir), "links_from": str(folder)}
    return PlannedStage(
        stage_id,
        folder,
        {name: values[name] for name in spec.takes},
        spec.settings_of_run(run_dir, experiments, claims),
        {str(need): need for need in joined},
    )


def folder_of(stage_id: StageId, run_dir: Path) -> Path:
    folder = run_dir / stage_id.folder
    return folder / stage_id.stage if STAGES[stage_id.stage].of_one_experiment else folder


def settings_of(stage: str, experiment: Experiment, baseline: Experiment | None = None) -> dict[str, Any]:
    """What of an experiment, and of that which it is compared with, decides the result of a stage."""
    spec = STAGES[stage]
    compared = {"baseline": baseline and baseline.title} if "baseline" in spec.reads else {}
    return spec.settings(experiment) | compared


def inputs_of_run(stage: str, run_dir: Path, kept: Mapping[str, str]) -> dict[str, str]:
    """Keys of what a stage reads that joins the results of a run, and what of the run was kept, which it says."""
    return STAGES[stage].joins(run_dir) | {f"{name} (kept)": commit for name, commit in kept.items()}


def code_digests(stage: str, notebook: Path, method: str = "") -> dict[str, str]:
    """Digests of the code that decides the result of a stage, of an experiment's method where that matters.

    Stages up to training make something, and what their notebooks show of it decides nothing: of these counts the call
    that makes it. Later stages make what they show. What a method sets of its trainer's arguments counts by value.
    """
    spec = STAGES[stage]
    also = code_of(method) if spec.by_method and method else []
    code = reached(notebook, spec.work, also, passed_over=DRAWING if spec.work else "")
    decided = {f"arguments of {method}": digest(json.dumps(decided_by(method), sort_keys=True))} if also else {}
    return code | decided
