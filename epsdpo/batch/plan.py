"""What a batch consists of, and which of its stages are due.

Experiments become stages, (sample →) prepare → (sft →) train → trajectory, evaluate → report, those in brackets where a
config asks for them. A batch that tests claims ends in `claims` and `precision`, not in `report`, made for few runs.
A stage is due unless its manifest says that just this was computed already, and unless a judge left comparisons out,
which are asked for again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsdpo.batch.specs import (
    STAGES,
    PlannedStage,
    StageId,
    code_digests,
    planned_over_run,
    planned_stage,
)
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.paper.claims.settings import Claims
from epsdpo.runs.fingerprint import differences, key_of, key_parts
from epsdpo.runs.layout import ANSWERS, NOTEBOOKS, not_judged, shared_folders
from epsdpo.runs.manifest import read_manifest, read_stage_file, unreadable


@dataclass(frozen=True)
class Standing:
    """Whether a stage is due, and why, in words.

    `outdated` says that its folder holds, whole or in part, the result of something else; `made` that it holds the
    whole result, also where a stage is due all the same.
    """

    parts: dict[str, dict]
    due: bool
    reason: str
    outdated: bool = False
    made: bool = False


def plan_stages(
    experiments: Iterable[Experiment],
    run_dir: Path,
    launch: dict[str, Any] | None = None,
    failed: Collection[StageId] = (),
    claims: Claims | None = None,
) -> dict[StageId, PlannedStage]:
    """All stages of a batch, in an order in which they can run.

    Args:
        launch: parameters of the training stages that say where they are computed.
        failed: stages that cannot be had. What strictly needs them is left out; comparisons do without them.
        claims: what the batch tests.
    """
    # The baselines first, so that the others can be shown beside them.
    experiments = sorted(experiments, key=lambda experiment: experiment.method != "dpo")
    planned: dict[StageId, PlannedStage] = {}
    baselines: dict[str, Experiment] = {}

    def add(stage: PlannedStage) -> bool:
        if stage.id in failed or any(need not in planned for need in stage.needs.values()):
            return False
        planned.setdefault(stage.id, stage)
        return True

    for experiment in experiments:
        shared = shared_folders(experiment)
        for stage in shared:
            add(planned_stage(stage, experiment, run_dir, launch))
        start = shared.get("sft", shared["prepare"])  # what runs must share to be compared
        if add(planned_stage("train", experiment, run_dir, launch)) and experiment.method == "dpo":
            baselines.setdefault(start, experiment)
        if experiment.trajectory:
            other = baselines.get(start)
            add(planned_stage("trajectory", experiment, run_dir, baseline=None if other is experiment else other))
        if experiment.evaluate is not None:
            add(planned_stage("evaluate", experiment, run_dir))
    evaluated = [stage for stage in planned if stage.stage == "evaluate"]
    shown = [stage for stage in planned if stage.stage in ("trajectory", "evaluate")]
    last = {"report": shown} if claims is None else {"claims": evaluated, "precision": evaluated}
    for stage, joined in last.items():
        if joined or claims is not None:
            add(planned_over_run(stage, run_dir, joined, experiments, claims))
    return planned


def standings(planned: dict[StageId, PlannedStage]) -> dict[StageId, Standing]:
    """For each stage whether it is due, and why."""
    found: dict[StageId, Standing] = {}
    code_of = functools.cache(lambda stage, method: code_digests(stage, NOTEBOOKS / STAGES[stage].notebook, method))
    for stage_id, stage in planned.items():
        inputs = {role: key_of(found[need].parts) for role, need in stage.needs.items()}
        joins = STAGES[stage.stage].joins
        if joins is not None:  # also what an earlier batch has left in the folder
            inputs = {**joins(stage.folder.parent), **inputs}
        parts = key_parts(stage.settings, code_of(stage.stage, stage.method), inputs)
        due_needs = [need for need in stage.needs.values() if found[need].due]
        found[stage_id] = _standing(stage, parts, due_needs)
    return found


def _standing(stage: PlannedStage, parts: dict[str, dict], due_needs: list[StageId]) -> Standing:
    if os.path.lexists(stage.folder) and not stage.folder.is_dir():
        return Standing(parts, due=True, reason="something else than a folder is in its place", outdated=True)
    damaged = unreadable(stage.folder)
    if damaged is not None:
        return Standing(parts, due=True, reason=f"{damaged.name} cannot be read, and counts as not run", outdated=True)
    manifest, stage_file = read_manifest(stage.folder), read_stage_file(stage.folder)
    found = manifest or stage_file
    if found is None:
        return Standing(parts, due=True, reason="not run yet")
    changes = differences(found.get("key_parts", {}), parts)
    if changes:
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        return Standing(parts, due=True, reason="; ".join(changes[:3]) + more, outdated=True)
    if manifest is None:
        return Standing(
            parts, due=True, reason="failed before" if stage_file["status"] == "failed" else "was interrupted"
        )
    if due_needs:
        return Standing(parts, due=True, reason=f"{due_needs[0]} is run again", made=True)
    if missing := not_judged(stage.folder):
        return Standing(parts, due=True, reason=f"{missing} comparisons were not judged", made=True)
    return Standing(parts, due=False, reason="finished", made=True)


def check_names(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that would take the folder of something else in the run."""
    experiments = list(experiments)
    taken = {ANSWERS, *(stage for stage, spec in STAGES.items() if spec.joins)}
    taken.update(*(shared_folders(experiment).values() for experiment in experiments))
    for experiment in experiments:
        if experiment.name in taken:
            raise ConfigError(f"name: {experiment.name!r} is a folder of the run itself; name the experiment otherwise")
