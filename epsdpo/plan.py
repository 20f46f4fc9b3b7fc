"""What a batch consists of, and which of its stages are due.

Experiments become stages, each with its folder, its parameters and the stages that it needs: prepare → train →
trajectory, evaluate → report. A stage is due unless its manifest says that just this was computed already, and unless
a judge left comparisons out, which are asked for again. This module reads manifests and decides; running is left to
`epsdpo.runner`, and what a key covers to `epsdpo.keys`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment
from epsdpo.keys import code_digests, differences, key_of, key_parts, settings_of
from epsdpo.manifest import read_manifest, read_stage_file
from epsdpo.run_folder import ANSWERS, NOTEBOOKS, STAGES, finished_analyses, not_judged, titles_in

REPORT = "report"


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


@dataclass(frozen=True)
class Verdict:
    """Whether a stage is due, and why, in words.

    `outdated` says that its folder holds, whole or in part, the result of something else.
    """

    parts: dict[str, dict]
    due: bool
    reason: str
    outdated: bool = False


def plan_stages(
    experiments: Iterable[Experiment],
    run_dir: Path,
    launch: dict[str, Any] | None = None,
    failed: Collection[str] = (),
) -> dict[str, PlannedStage]:
    """All stages of a batch by name, in an order in which they can run.

    Args:
        launch: parameters of the train stages that say where they are computed.
        failed: names of stages that cannot be had. What strictly needs them is left out; comparisons do without them.
    """
    # The baselines first, so that the others can be shown beside them.
    experiments = sorted(experiments, key=lambda experiment: experiment.method != "dpo")
    planned: dict[str, PlannedStage] = {}
    baselines: dict[str, Experiment] = {}

    def add(name: str, stage: str, **values: Any) -> bool:
        if name in failed or any(need not in planned for need in values.get("needs", {}).values()):
            return False
        planned[name] = PlannedStage(name=name, stage=stage, **values)
        return True

    for experiment in experiments:
        folder, config = run_dir / experiment.name, str(run_dir / experiment.name / EXPERIMENT_FILE)
        data_dir = run_dir / data_folder(experiment)
        prepare, train = f"{data_dir.name}/prepare", f"{experiment.name}/train"
        if prepare not in planned:
            add(
                prepare,
                "prepare",
                folder=data_dir,
                experiment=None,
                parameters={"config": config},
                settings=settings_of("prepare", experiment),
            )
        trained = add(
            train,
            "train",
            folder=folder / "train",
            experiment=experiment.name,
            parameters={"config": config, "data_dir": str(data_dir), "live": False, **(launch or {})},
            settings=settings_of("train", experiment),
            needs={"data": prepare},
        )
        if trained and experiment.method == "dpo":
            baselines.setdefault(data_dir.name, experiment)
        baseline = baselines.get(data_dir.name, experiment)
        compared = baseline is not experiment
        add(
            f"{experiment.name}/trajectory",
            "trajectory",
            folder=folder / "trajectory",
            experiment=experiment.name,
            parameters={
                "train_dir": str(folder / "train"),
                "compare_with": str(run_dir / baseline.name / "train") if compared else "",
                "data_dir": str(data_dir),
            },
            settings={"title": experiment.title, "baseline": baseline.title if compared else None},
            needs={"data": prepare, "train": train} | ({"baseline": f"{baseline.name}/train"} if compared else {}),
        )
        if experiment.evaluate is not None:
            add(
                f"{experiment.name}/evaluate",
                "evaluate",
                folder=folder / "evaluate",
                experiment=experiment.name,
                parameters={
                    "config": config,
                    "data_dir": str(data_dir),
                    "train_dir": str(folder / "train"),
                    # Beside the stage's folder, which makes way when it is outdated: what was paid for stays.
                    "keep_answers_in": str(folder / ANSWERS),
                },
                settings=settings_of("evaluate", experiment),
                needs={"data": prepare, "train": train},
            )
    shown = [stage.name for stage in planned.values() if stage.stage in ("trajectory", "evaluate")]
    if shown:
        titles = {experiment.name: experiment.title for experiment in experiments}
        add(
            f"{REPORT}/report",
            "report",
            folder=run_dir / REPORT,
            experiment=None,
            parameters={"run_dir": str(run_dir), "links_from": str(run_dir / REPORT)},
            settings={"titles": titles},
            needs={name: name for name in shown},
        )
    return planned


def judge(planned: dict[str, PlannedStage]) -> dict[str, Verdict]:
    """For each stage whether it is due, and why."""
    verdicts: dict[str, Verdict] = {}
    code = {stage: code_digests(stage, NOTEBOOKS / notebook) for stage, notebook in STAGES.items()}
    for name, stage in planned.items():
        settings = stage.settings
        inputs = {role: key_of(verdicts[need].parts) for role, need in stage.needs.items()}
        if stage.stage == "report":
            # It shows all that is in the folder, also what an earlier batch has left there.
            run_dir = stage.folder.parent
            settings = {"titles": {**titles_in(run_dir), **settings["titles"]}}
            inputs = {**finished_analyses(run_dir), **inputs}
        parts = key_parts(settings, code[stage.stage], inputs)
        due_needs = [need for need in stage.needs.values() if verdicts[need].due]
        verdicts[name] = _judge_one(stage, parts, due_needs)
    return verdicts


def _judge_one(stage: PlannedStage, parts: dict[str, dict], due_needs: list[str]) -> Verdict:
    manifest, stage_file = read_manifest(stage.folder), read_stage_file(stage.folder)
    found = manifest or stage_file
    if found is None:
        return Verdict(parts, due=True, reason="not run yet")
    changes = differences(found["key_parts"], parts)
    if changes:
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        return Verdict(parts, due=True, reason="; ".join(changes[:3]) + more, outdated=True)
    if manifest is None:
        return Verdict(
            parts, due=True, reason="failed before" if stage_file["status"] == "failed" else "was interrupted"
        )
    if due_needs:
        return Verdict(parts, due=True, reason=f"{due_needs[0]} is run again")
    if missing := not_judged(stage.folder):
        return Verdict(parts, due=True, reason=f"{missing} comparisons were not judged")
    return Verdict(parts, due=False, reason="finished")


def data_folder(experiment: Experiment) -> str:
    """Name of the prepared-data folder: experiments whose data would come out the same share one."""
    decisive = json.dumps(settings_of("prepare", experiment), sort_keys=True)
    return "data-" + hashlib.sha256(decisive.encode()).hexdigest()[:8]


def check_names(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that would take the folder of something else in the run."""
    experiments = list(experiments)
    taken = {REPORT, *(data_folder(experiment) for experiment in experiments)}
    for experiment in experiments:
        if experiment.name in taken:
            raise ConfigError(f"name: {experiment.name!r} is a folder of the run itself; name the experiment otherwise")
