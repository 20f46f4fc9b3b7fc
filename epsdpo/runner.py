"""Batches: what is due is run, in order, several at once, and what is finished is left alone.

`epsdpo.plan` says what is due. Here it is written down for Snakemake, which orders, spreads and submits the stages,
each a process `python -m epsdpo stage`; then it is watched, and what failed is told. How a stage is run is the business
of `epsdpo.stages`, how progress looks that of `epsdpo.progress`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from epsdpo.claims.settings import Claims, check_runs, fix_claims
from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, load_saved, save_experiment
from epsdpo.files import disk_is_full, written_whole
from epsdpo.index import write_index
from epsdpo.local_models import require_local
from epsdpo.manifest import LOG, MANIFEST, read_manifest, read_stage_file
from epsdpo.models import pin_revision
from epsdpo.plan import PlannedStage, Verdict, check_names, judge, plan_stages
from epsdpo.progress import Display, follow

STATE_FOLDER = ".epsdpo"
BATCH_FILE, PLAN_FILE, LOCK_FILE = "batch.json", "plan.json", "lock"
SUPERSEDED = "superseded"

_WORKFLOW = Path(__file__).with_name("workflow.smk")
_ON_GPU = ("sample", "sft", "train", "evaluate")
_LAUNCHED = ("sft", "train")  # in as many processes as are asked for


@dataclass(frozen=True)
class Resources:
    """Where a batch runs.

    Attributes:
        jobs: stages at once on this machine.
        gpus: GPUs to share out, one to a stage (or `num_processes` to a launched training); 0 leaves GPUs alone.
        time_limit: hours that a stage may take, or None.
        profile: folder of a Snakemake profile, which submits the stages to a cluster; "" runs them here.
        launch_config, num_processes: how training processes are launched, see `epsdpo.launch`.
    """

    jobs: int = 1
    gpus: int = 0
    time_limit: float | None = None
    profile: str = ""
    launch_config: str = ""
    num_processes: int = 0


class Failure(NamedTuple):
    """The folder of a stage that failed, with its log, and what went wrong."""

    folder: Path
    error: str


@dataclass(frozen=True)
class Outcome:
    """How a batch ended: names of the stages that are finished now, those that failed, and those not run for that."""

    finished: list[str]
    failed: dict[str, Failure]
    not_run: list[str]


def run_batch(
    experiments: list[Experiment],
    run_dir: Path,
    resources: Resources = Resources(),
    claims: Claims | None = None,
) -> Outcome:
    """Bring a run folder to the state that `experiments` ask for, running what is due for it and nothing else.

    A stage that fails stops what strictly needs it; everything else is run. What a changed config makes outdated is
    moved to `superseded/`, not deleted.

    Args:
        claims: what the batch tests; fixed in `run_dir` before anything is run.

    Raises:
        ConfigError: before anything is run, if an experiment or the resources make no sense, if another runner works in
            `run_dir`, or if that cannot be written to.
    """
    launch = _check(experiments, resources)
    if claims is not None:
        check_runs(claims, experiments)
    for experiment in experiments:
        if not (run_dir / experiment.name / "train" / MANIFEST).exists():
            require_local(experiment)
    with sole_runner(run_dir):
        if claims is not None:
            fix_claims(claims, run_dir)
        experiments = [_settle(experiment, run_dir) for experiment in experiments]
        failed: dict[str, Failure] = {}
        while True:
            planned = plan_stages(experiments, run_dir, launch, failed, claims)
            verdicts = judge(planned)
            due = {name: stage for name, stage in planned.items() if verdicts[name].due}
            _write_json(run_dir / STATE_FOLDER / PLAN_FILE, _described(planned, failed))
            if not due:
                break
            for name, stage in due.items():
                _make_way(stage, verdicts[name])
            begun = time.time()
            _run_due(due, run_dir, resources, Display(run_dir))
            newly_failed = {name: _failure(stage, begun) for name, stage in due.items() if not _finished(stage)}
            newly_failed = {
                name: Failure(due[name].folder, why) for name, why in newly_failed.items() if why is not None
            }
            if not newly_failed:
                break
            failed |= newly_failed
        write_index(run_dir)
        every = plan_stages(experiments, run_dir, launch, claims=claims)
        finished = [name for name, stage in planned.items() if _finished(stage)]
        return Outcome(
            finished=finished,
            failed=failed,
            not_run=[name for name in every if name not in finished and name not in failed],
        )


def look_at_batch(
    experiments: list[Experiment],
    run_dir: Path,
    resources: Resources = Resources(),
    claims: Claims | None = None,
) -> dict[str, Verdict]:
    """What `run_batch` would do, for each stage; nothing is run, written or asked of a hub."""
    launch = _check(experiments, resources)
    if claims is not None:
        check_runs(claims, experiments)
    known = [_known(experiment, run_dir) for experiment in experiments]
    planned = plan_stages(known, run_dir, launch, claims=claims)
    return judge(planned)


def _check(experiments: list[Experiment], resources: Resources) -> dict[str, Any]:
    """Refuse what cannot work, and return the parameters of training that say where it is computed."""
    check_names(experiments)
    if resources.launch_config or resources.num_processes:
        from epsdpo.launch import launcher_command  # loads torch by way of accelerate

        for experiment in experiments:
            launcher_command(resources.launch_config, resources.num_processes, experiment)
    if resources.jobs < 1:
        raise ConfigError(f"--jobs is {resources.jobs}; give 1 or more stages at once")
    needed = max(1, resources.num_processes)
    if resources.gpus < 0 or 0 < resources.gpus < needed:
        raise ConfigError(f"--gpus is {resources.gpus}, but one training takes {needed}; give at least that many")
    if resources.time_limit is not None and not resources.time_limit > 0:
        raise ConfigError(f"--time-limit is {resources.time_limit:g} hours; give more than 0")
    if resources.profile and not Path(resources.profile).is_dir():
        raise ConfigError(f"--profile {resources.profile}: no such folder; start from one of configs/cluster")
    if not resources.launch_config:
        return {}
    return {"launch_config": resources.launch_config, "num_processes": resources.num_processes}


@contextmanager
def sole_runner(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, so that no second runner works in it; the system lets go of it however this process ends."""
    state = run_dir / STATE_FOLDER
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(state / LOCK_FILE, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        owner = (state / f"{LOCK_FILE}.owner").read_text(encoding="utf-8")
        raise ConfigError(
            f"{run_dir} is being worked on by another runner ({owner}). Wait for it, look at it with "
            f"`python -m epsdpo status {run_dir}`, or choose another folder with --output"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{run_dir} cannot be written to ({error.strerror}). Choose another folder with --output"
        ) from error
    with lock:
        owner = f"process {os.getpid()} on {platform.node()}"
        (state / f"{LOCK_FILE}.owner").write_text(owner, encoding="utf-8")
        yield


def _known(experiment: Experiment, run_dir: Path) -> Experiment:
    """The experiment with the model's commit that its run has resolved before, if the config leaves it open."""
    file = run_dir / experiment.name / EXPERIMENT_FILE
    if not file.exists() or experiment.model.revision is not None:
        return experiment
    before = load_saved(file).model
    if before.name_or_path != experiment.model.name_or_path:
        return experiment
    return experiment.model_copy(update={"model": experiment.model.model_copy(update={"revision": before.revision})})


def _settle(experiment: Experiment, run_dir: Path) -> Experiment:
    """Write the experiment, resolved, into its folder, and return it with its model's commit."""
    experiment = _known(experiment, run_dir)
    experiment = experiment.model_copy(update={"model": pin_revision(experiment.model)})
    path = run_dir / experiment.name / EXPERIMENT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_experiment(experiment, partial)
    return experiment


def _make_way(stage: PlannedStage, verdict: Verdict) -> None:
    """Clear the folder of a stage for what is due: move aside the result of something else, undo that of the same."""
    if verdict.outdated:
        found = read_manifest(stage.folder) or read_stage_file(stage.folder)
        place = stage.folder.parent / SUPERSEDED / f"{stage.folder.name}-{found['key'][:8]}"
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{stage.folder.name}-{found['key'][:8]}-{number}")
        place.parent.mkdir(exist_ok=True)
        stage.folder.rename(place)
    else:
        (stage.folder / MANIFEST).unlink(missing_ok=True)


def _run_due(due: dict[str, PlannedStage], run_dir: Path, resources: Resources, display: Display) -> None:
    """Have Snakemake run stages, and show how they come along until it ends."""
    state = run_dir / STATE_FOLDER
    rules = [_as_rule(stage, due, run_dir, resources) for stage in due.values()]
    for place, rule in enumerate(reversed(rules)):
        rule["priority"] = place  # in the order of the plan, where there is a choice
    _write_json(state / BATCH_FILE, rules)
    command = [sys.executable, "-m", "epsdpo.workflow", "--snakefile", str(_WORKFLOW.resolve())]
    command += ["--config", f"batch={(state / BATCH_FILE).resolve()}", "--directory", str(state.resolve())]
    # Snakemake is told of due stages only, and need not find out for itself what has changed.
    command += ["--rerun-triggers", "mtime", "--keep-going", "--nolock", "--quiet", "all"]
    if resources.profile:
        command += ["--profile", resources.profile, "--jobs", str(resources.jobs)]
    else:
        command += ["--cores", str(resources.jobs)]
        if resources.gpus:
            command += ["--resources", f"gpu={resources.gpus}"]
    environment = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": ""}
    if resources.jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // resources.jobs)))
    with (state / "snakemake.log").open("ab") as log:
        process = subprocess.Popen(
            # Held open and never written to: Snakemake and the stages below it end when it closes, which it does
            # however this process ends.
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # an interrupt of the terminal comes by way of this process
        )
        try:
            with display:
                follow(process, display, lambda: write_index(run_dir))
        finally:
            process.stdin.close()
            process.wait()


def _as_rule(stage: PlannedStage, due: dict[str, PlannedStage], run_dir: Path, resources: Resources) -> dict[str, Any]:
    command = [sys.executable, "-m", "epsdpo", "stage", stage.stage, "--output", str(stage.folder)]
    for name, value in stage.parameters.items():
        command += ["--parameter", f"{name}={json.dumps(value)}"]
    if resources.time_limit is not None:
        command += ["--time-limit", f"{resources.time_limit:g}"]
    gpus = max(1, resources.num_processes if stage.stage in _LAUNCHED else 1) if stage.stage in _ON_GPU else 0
    if not resources.profile:
        command += ["--end-with-stdin"]
        if resources.gpus and gpus:
            command += ["--take-gpus", f"{gpus}/{resources.gpus}"]
    here, folder, log = (shlex.quote(str(path)) for path in (Path.cwd(), stage.folder, stage.folder / LOG))
    return {
        "name": stage.name,
        "manifest": str((stage.folder / MANIFEST).resolve()),
        "needs": [str((due[need].folder / MANIFEST).resolve()) for need in stage.needs.values() if need in due],
        "threads": 1,
        "gpus": gpus,
        "minutes": math.ceil(60 * (resources.time_limit or 24)),
        "command": f"cd {here} && mkdir -p {folder} && exec {shlex.join(command)} >> {log} 2>&1",
    }


def _finished(stage: PlannedStage) -> bool:
    return (stage.folder / MANIFEST).exists()


def _failure(stage: PlannedStage, begun: float) -> str | None:
    """Why a stage failed that was due at the time `begun`; None if it was not run, because one that it needs failed."""
    log, state = stage.folder / LOG, read_stage_file(stage.folder)
    if not log.exists() or log.stat().st_mtime < begun:
        return None
    if state is not None and state["status"] == "failed":
        return state["error"]
    if disk_is_full(stage.folder):
        return "the disk is full"
    last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
    if state is None:
        return "\n".join(last_lines)  # refused before it began
    return "\n".join(["its process was killed; most often the machine ran out of memory", *last_lines])


def _described(planned: dict[str, PlannedStage], failed: dict[str, Failure]) -> dict[str, Any]:
    """The plan as `epsdpo.progress` reads it, also from another process."""
    stages = {name: {"stage": stage.stage, "folder": str(stage.folder.resolve())} for name, stage in planned.items()}
    for name, failure in failed.items():
        stages[name] = {"stage": name.split("/")[-1], "folder": str(failure.folder.resolve()), "error": failure.error}
    return {"stages": stages}


def _write_json(path: Path, content: Any) -> None:
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
