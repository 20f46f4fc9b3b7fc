"""What a batch consists of, and which of its stages are due.

Experiments become stages, (sample →) prepare → (sft →) train → trajectory, evaluate → report, those in brackets where a
config asks for them. A batch that tests claims ends in `claims` and `precision`, not in `report`, made for few runs.
A stage is due unless its manifest says that just this was computed already, and unless a judge left comparisons out,
which are asked for again. This module reads manifests and decides; what a single stage is it leaves to
`epsdpo.batch.specs`, what a key covers to `epsdpo.runs.fingerprint`, and running to `epsdpo.batch.runner`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epsdpo.batch.specs import (
    CLAIMS,
    PRECISION,
    REPORT,
    Place,
    PlannedStage,
    claims_stage,
    data_folder,
    evaluate_stage,
    pairs_folder,
    precision_stage,
    prepare_stage,
    report_stage,
    sample_stage,
    sft_folder,
    sft_stage,
    train_stage,
    trajectory_stage,
)
from epsdpo.experiment import ConfigError, Experiment
from epsdpo.paper.claims.settings import Claims
from epsdpo.runs.fingerprint import code_digests, differences, key_of, key_parts
from epsdpo.runs.layout import NOTEBOOKS, STAGES, finished_analyses, not_judged, tested_on, titles_in
from epsdpo.runs.manifest import read_manifest, read_stage_file, unreadable


@dataclass(frozen=True)
class Verdict:
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
    failed: Collection[str] = (),
    claims: Claims | None = None,
) -> dict[str, PlannedStage]:
    """All stages of a batch by name, in an order in which they can run.

    Args:
        launch: parameters of the training stages that say where they are computed.
        failed: names of stages that cannot be had. What strictly needs them is left out; comparisons do without them.
        claims: what the batch tests.
    """
    # The baselines first, so that the others can be shown beside them.
    experiments = sorted(experiments, key=lambda experiment: experiment.method != "dpo")
    planned: dict[str, PlannedStage] = {}
    baselines: dict[str, Experiment] = {}

    def add(stage: PlannedStage) -> bool:
        if stage.name in failed or any(need not in planned for need in stage.needs.values()):
            return False
        planned.setdefault(stage.name, stage)
        return True

    for experiment in experiments:
        place = Place(experiment, run_dir)
        if place.pairs is not None:
            add(sample_stage(place))
        add(prepare_stage(place))
        if place.sft is not None:
            add(sft_stage(place, launch or {}))
        start = (place.sft or place.data).name  # what runs must share to be compared
        if add(train_stage(place, launch or {})) and experiment.method == "dpo":
            baselines.setdefault(start, experiment)
        if experiment.trajectory:
            add(trajectory_stage(place, baselines.get(start, experiment)))
        if experiment.evaluate is not None:
            add(evaluate_stage(place))
    shown = [stage.name for stage in planned.values() if stage.stage in ("trajectory", "evaluate")]
    if claims is not None:
        evaluated = [stage.name for stage in planned.values() if stage.stage == "evaluate"]
        add(claims_stage(run_dir, evaluated, claims.model_dump()))
        add(precision_stage(run_dir, evaluated))
    elif shown:
        add(report_stage(run_dir, shown, {experiment.name: experiment.title for experiment in experiments}))
    return planned


def judge(planned: dict[str, PlannedStage]) -> dict[str, Verdict]:
    """For each stage whether it is due, and why."""
    verdicts: dict[str, Verdict] = {}
    used = {stage.stage for stage in planned.values()}
    code = {stage: code_digests(stage, NOTEBOOKS / STAGES[stage]) for stage in used}
    for name, stage in planned.items():
        settings = stage.settings
        inputs = {role: key_of(verdicts[need].parts) for role, need in stage.needs.items()}
        if stage.stage == "report":
            # It shows all that is in the folder, also what an earlier batch has left there.
            run_dir = stage.folder.parent
            settings = {"titles": {**titles_in(run_dir), **settings["titles"]}}
            inputs = {**finished_analyses(run_dir), **inputs}
        if stage.stage in ("claims", "precision"):
            inputs = {**tested_on(stage.folder.parent), **inputs}
        parts = key_parts(settings, code[stage.stage], inputs)
        due_needs = [need for need in stage.needs.values() if verdicts[need].due]
        verdicts[name] = _judge_one(stage, parts, due_needs)
    return verdicts


def _judge_one(stage: PlannedStage, parts: dict[str, dict], due_needs: list[str]) -> Verdict:
    if os.path.lexists(stage.folder) and not stage.folder.is_dir():
        return Verdict(parts, due=True, reason="something else than a folder is in its place", outdated=True)
    damaged = unreadable(stage.folder)
    if damaged is not None:
        return Verdict(parts, due=True, reason=f"{damaged.name} cannot be read, and counts as not run", outdated=True)
    manifest, stage_file = read_manifest(stage.folder), read_stage_file(stage.folder)
    found = manifest or stage_file
    if found is None:
        return Verdict(parts, due=True, reason="not run yet")
    changes = differences(found.get("key_parts", {}), parts)
    if changes:
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        return Verdict(parts, due=True, reason="; ".join(changes[:3]) + more, outdated=True)
    if manifest is None:
        return Verdict(
            parts, due=True, reason="failed before" if stage_file["status"] == "failed" else "was interrupted"
        )
    if due_needs:
        return Verdict(parts, due=True, reason=f"{due_needs[0]} is run again", made=True)
    if missing := not_judged(stage.folder):
        return Verdict(parts, due=True, reason=f"{missing} comparisons were not judged", made=True)
    return Verdict(parts, due=False, reason="finished", made=True)


def check_names(experiments: Iterable[Experiment]) -> None:
    """Refuse experiments that would take the folder of something else in the run."""
    experiments = list(experiments)
    shared = (pairs_folder, data_folder, sft_folder)
    taken = {REPORT, CLAIMS, PRECISION, *(folder(experiment) for experiment in experiments for folder in shared)}
    for experiment in experiments:
        if experiment.name in taken:
            raise ConfigError(f"name: {experiment.name!r} is a folder of the run itself; name the experiment otherwise")
