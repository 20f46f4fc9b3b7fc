"""What a batch consists of, and which of its stages are due.

Experiments become stages, (sample →) prepare → (sft →) train → trajectory, evaluate → report, those in brackets where a
config asks for them. A batch that tests claims ends in `claims` and `precision`, not in `report`, made for few runs,
and in `claims` alone if it looks at them more than once; one that studies the criterion on real text has `real_text`
too.
A stage is due unless its manifest says that just this was computed already, or, where results are to be kept, the same
but for the code that did it; and unless a judge left comparisons out, which are asked for again.
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
    inputs_of_run,
    planned_over_run,
    planned_stage,
)
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.paper.claims.settings import Claims
from epsdpo.runs.fingerprint import differences, key_of, key_parts
from epsdpo.runs.layout import ANSWERS, NOTEBOOKS, REAL_TEXT, kept_in, not_judged, shared_folders
from epsdpo.runs.manifest import commit_now, is_kept, read_manifest, read_stage_file, unreadable


@dataclass(frozen=True)
class Standing:
    """Whether a stage is due, and why, in words.

    Attributes:
        parts: of its key, as of now.
        key: of the result that there will be: that of these parts, or of the result that is kept.
        outdated: whether its folder holds, whole or in part, the result of something else.
        made: whether it holds the whole result, also where the stage is due all the same.
        keeps: whether that result is to be kept, though other code made it, and is not marked so yet.
    """

    parts: dict[str, dict]
    key: str
    due: bool
    reason: str
    outdated: bool = False
    made: bool = False
    keeps: bool = False


def plan_stages(
    experiments: Iterable[Experiment],
    run_dir: Path,
    launch: dict[str, Any] | None = None,
    failed: Collection[StageId] = (),
    claims: Claims | None = None,
    real_text: bool = False,
) -> dict[StageId, PlannedStage]:
    """All stages of a batch, in an order in which they can run.

    Args:
        launch: parameters of the training stages that say where they are computed.
        failed: stages that cannot be had. What strictly needs them is left out; comparisons do without them.
        claims: what the batch tests.
        real_text: whether it studies what the criterion decides with the policies that it trained.
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
    last = {"report": shown} if claims is None else {"claims": evaluated}
    if claims is not None and not claims.looks:  # which end in the verdicts that they are for
        last["precision"] = evaluated
    if real_text:
        last["real_text"] = [stage for stage in planned if stage.stage == "train"] + shown
    for stage, joined in last.items():
        if joined or claims is not None:
            add(planned_over_run(stage, run_dir, joined, experiments, claims))
    return planned


def standings(planned: dict[StageId, PlannedStage], keep_results: bool = False) -> dict[StageId, Standing]:
    """For each stage whether it is due, and why.

    Args:
        keep_results: whether a finished result stays that differs from what would be made in its code alone.
    """
    found: dict[StageId, Standing] = {}
    code_of = functools.cache(lambda stage, method: code_digests(stage, NOTEBOOKS / STAGES[stage].notebook, method))
    for stage_id, stage in planned.items():
        inputs = {role: found[need].key for role, need in stage.needs.items()}
        if STAGES[stage.stage].joins is not None:  # also what an earlier batch has left in the folder
            run_dir = stage.folder.parent
            inputs = {**inputs_of_run(stage.stage, run_dir, _kept(run_dir, found)), **inputs}
        parts = key_parts(stage.settings, code_of(stage.stage, stage.method), inputs)
        due_needs = [need for need in stage.needs.values() if found[need].due]
        found[stage_id] = _standing(stage, parts, due_needs, keep_results)
    return found


def _kept(run_dir: Path, found: dict[StageId, Standing]) -> dict[str, str]:
    """What of a run will have been kept when all that is due has been run."""
    remains = kept_in(run_dir)
    for stage_id, standing in found.items():
        if standing.due:
            remains.pop(str(stage_id), None)
        elif standing.keeps:
            remains[str(stage_id)] = commit_now(REPOSITORY)
    return remains


def _standing(stage: PlannedStage, parts: dict[str, dict], due_needs: list[StageId], keep_results: bool) -> Standing:
    def due(reason: str, **more: bool) -> Standing:
        return Standing(parts, key_of(parts), due=True, reason=reason, **more)

    if os.path.lexists(stage.folder) and not stage.folder.is_dir():
        return due("something else than a folder is in its place", outdated=True)
    damaged = unreadable(stage.folder)
    if damaged is not None:
        return due(f"{damaged.name} cannot be read, and counts as not run", outdated=True)
    manifest, stage_file = read_manifest(stage.folder), read_stage_file(stage.folder)
    recorded = (manifest or stage_file or {}).get("key_parts", {})
    if manifest is None and stage_file is None:
        return due("not run yet")
    with_this_code = {**recorded, "code": parts["code"]}
    if manifest is not None and is_kept(manifest, parts["code"]):
        recorded = with_this_code
    changes, missing = differences(recorded, parts), not_judged(stage.folder)
    whole = manifest is not None and not due_needs and not missing
    keeps = bool(changes) and keep_results and whole and not differences(with_this_code, parts)
    reason = "; ".join(changes[:3]) + (f" (and {len(changes) - 3} more)" if len(changes) > 3 else "")
    if changes and not keeps:
        return due(reason, outdated=True)
    if manifest is None:
        return due("failed before" if stage_file["status"] == "failed" else "was interrupted")
    if due_needs:
        return due(f"{due_needs[0]} is run again", made=True)
    if missing:
        return due(f"{missing} comparisons were not judged", made=True)
    return Standing(parts, manifest["key"], due=False, reason=reason or "finished", made=True, keeps=keeps)


def check_names(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that would take the folder of something else in the run."""
    experiments = list(experiments)
    taken = {ANSWERS, REAL_TEXT, *(stage for stage, spec in STAGES.items() if spec.joins)}
    taken.update(*(shared_folders(experiment).values() for experiment in experiments))
    for experiment in experiments:
        if experiment.name in taken:
            raise ConfigError(f"name: {experiment.name!r} is a folder of the run itself; name the experiment otherwise")
