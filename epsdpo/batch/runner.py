"""Batches: what is due is run, in order, several at once, and what is finished is left alone.

The plan says what is due. Snakemake orders, spreads and submits those stages, each a process `python -m epsdpo stage`;
then their manifests are looked at, and what failed is told.
"""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any, NamedTuple

import filelock

from epsdpo.batch.engine import ONE_AT_A_TIME, Begun, Ended, Resources, begun_stages, run_due, signal_name
from epsdpo.batch.index import INDEX, write_index
from epsdpo.batch.plan import Standing, check_names, plan_stages, standings
from epsdpo.batch.progress import PLAN, Display
from epsdpo.batch.specs import PlannedStage, StageId
from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, load_saved, save_experiment
from epsdpo.experiment.gguf_file import is_gguf
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.files import AFTER_DISK_FULL, disk_is_full, flush_to_disk, written_whole
from epsdpo.models.local_models import require_local
from epsdpo.models.own_code import require_no_own_code
from epsdpo.models.start import pin_revision
from epsdpo.paper.claims.fixed import fix_claims
from epsdpo.paper.claims.settings import Claims, check_runs
from epsdpo.paper.published import Published, leave_published
from epsdpo.runs.layout import STATE_FOLDER, SUPERSEDED, titles_in
from epsdpo.runs.manifest import LOG, MANIFEST, keep, read_manifest, read_stage_file, unreadable
from epsdpo.runs.watch import ORPHANED

LOCK_FILE = "lock"

_LAST_LINES = 3
_NOT_BEGUN = Begun("", None)  # by a cluster


class Failure(NamedTuple):
    """The folder of a stage that failed, with its log, and what went wrong."""

    folder: Path
    error: str


@dataclass(frozen=True)
class Outcome:
    """How a batch ended. It is a success if every stage is finished.

    Attributes:
        finished: the stages that have a manifest with their key, whatever was said on the way.
        kept: those of them that were accepted now though other code made them, each with what changed.
        failed: those that were begun and did not get there.
        not_run: the others, each with the reason.
        trouble: what went wrong with Snakemake itself; "" if nothing did.
    """

    finished: list[StageId]
    kept: dict[StageId, str]
    failed: dict[StageId, Failure]
    not_run: dict[StageId, str]
    trouble: str


def run_batch(
    experiments: list[Experiment],
    run_dir: Path,
    resources: Resources = ONE_AT_A_TIME,
    claims: Claims | None = None,
    keep_results: bool = False,
    real_text: bool = False,
    published: Sequence[Published] = (),
) -> Outcome:
    """Bring a run folder to the state that `experiments` ask for, running what is due for it and nothing else.

    A stage that fails stops what strictly needs it; everything else is run. What a changed config makes outdated is
    moved to `superseded/`, not deleted.

    Args:
        claims: what the batch tests; fixed in `run_dir` before anything is run.
        keep_results: whether finished results stay that differ in their code alone; they are marked.
        real_text: whether the batch studies what the criterion decides with its policies.
        published: tables of the paper that its pages put beside its runs.

    Raises:
        ConfigError: before anything is run, if an experiment or the resources make no sense, if another runner works in
            `run_dir`, or if that cannot be written to.
    """
    launch = _check(experiments, run_dir, resources)
    if claims is not None:
        check_runs(claims, experiments)
    for experiment in experiments:
        if not (run_dir / experiment.name / "train" / MANIFEST).exists():
            require_local(experiment)
    with sole_runner(run_dir):
        if claims is not None:
            fix_claims(claims, run_dir)
        leave_published(published, run_dir)
        experiments = [_settle(experiment, run_dir) for experiment in experiments]
        failed: dict[StageId, Failure] = {}
        kept: dict[StageId, str] = {}
        trouble = ""
        while True:
            planned = plan_stages(experiments, run_dir, launch, failed, claims, real_text)
            found = standings(planned, keep_results)
            for stage_id, standing in found.items():
                if standing.keeps:
                    keep(planned[stage_id].folder, standing.parts["code"], REPOSITORY)
                    kept[stage_id] = standing.reason
            due = {stage_id: stage for stage_id, stage in planned.items() if found[stage_id].due}
            _write_plan(planned, failed, run_dir)
            if not due:
                break
            for stage_id, stage in due.items():
                _make_way(stage, found[stage_id])
            before = {stage_id: _Trace.of(stage) for stage_id, stage in due.items()}
            write_index(run_dir)  # pages link to it from their first on
            ended = run_due(due, run_dir, resources, Display(run_dir))
            newly_failed, trouble = _look_back(due, before, standings(planned), ended, begun_stages(due, run_dir))
            failed |= newly_failed
            if trouble or not newly_failed:
                break
        _write_plan(planned, failed, run_dir)
        write_index(run_dir)
        # Looked at last, and nothing else counts.
        found = standings(planned)
        finished = [stage_id for stage_id in planned if found[stage_id].made]
        not_run = {}
        for stage_id in plan_stages(experiments, run_dir, launch, claims=claims, real_text=real_text):
            if stage_id in failed or stage_id in finished:
                continue
            if stage_id not in planned:
                not_run[stage_id] = "because a stage that it needs failed"
            elif trouble:
                not_run[stage_id] = "because Snakemake ended before it was"
            else:
                not_run[stage_id] = f"because {found[stage_id].reason}; the same command goes on"
        return Outcome(finished, kept, failed, not_run, trouble)


def look_at_batch(
    experiments: list[Experiment],
    run_dir: Path,
    resources: Resources = ONE_AT_A_TIME,
    claims: Claims | None = None,
    keep_results: bool = False,
    real_text: bool = False,
) -> dict[StageId, Standing]:
    """What `run_batch` would do, for each stage; nothing is run, written or asked of a hub."""
    launch = _check(experiments, run_dir, resources)
    if claims is not None:
        check_runs(claims, experiments)
    known = [_known(experiment, run_dir) for experiment in experiments]
    planned = plan_stages(known, run_dir, launch, claims=claims, real_text=real_text)
    return standings(planned, keep_results)


def _check(experiments: list[Experiment], run_dir: Path, resources: Resources) -> dict[str, Any]:
    """Refuse what cannot work, and return the parameters of training that say where it is computed."""
    check_names(experiments)
    _check_folder(experiments, run_dir)
    require_no_own_code(experiments)
    if resources.launch_config or resources.num_processes:
        from epsdpo.train.launch import launcher_command

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


def _check_folder(experiments: list[Experiment], run_dir: Path) -> None:
    try:
        str(run_dir.resolve()).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"the name of the run folder {str(run_dir.resolve())!a} is not UTF-8, as the files in it are. Choose "
            "another with --output"
        ) from None
    if run_dir.is_symlink() and not run_dir.exists():
        raise ConfigError(
            f"{run_dir} is a link to {run_dir.readlink()}, which is not there. Make that folder, or choose another "
            "with --output"
        )
    if (run_dir / INDEX).is_dir():
        raise ConfigError(f"{run_dir / INDEX} is a folder, where the index is to be written. Move it away")
    # Tables and figures of a folder go by title.
    names = {experiment.name for experiment in experiments}
    others = {title: name for name, title in titles_in(run_dir).items() if name not in names}
    for experiment in experiments:
        if experiment.title in others:
            raise ConfigError(
                f"{experiment.name}: title {experiment.title!r} is that of {run_dir / others[experiment.title]} "
                "already. Give it another `title`, or move that folder away"
            )


@contextmanager
def sole_runner(run_dir: Path) -> Iterator[None]:
    """Keep other runners out of the run folder; the system lets go of the lock however this process ends."""
    state = run_dir / STATE_FOLDER
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(state / LOCK_FILE, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        try:
            owner = (state / f"{LOCK_FILE}.owner").read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            owner = ""  # it has only just begun
        raise ConfigError(
            f"{run_dir} is being worked on by another runner ({owner or 'which just began'}). Wait for it, look at it "
            f"with `python -m epsdpo status {run_dir}`, or choose another folder with --output"
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
    """The experiment with the commit of its model that its run resolved before, where the config does not name one;
    with the content of a GGUF file as it is now."""
    if is_gguf(experiment.model.name_or_path) and Path(experiment.model.name_or_path).exists():
        return experiment.model_copy(update={"model": pin_revision(experiment.model)})
    file = run_dir / experiment.name / EXPERIMENT_FILE
    if not file.exists() or experiment.model.revision is not None:
        return experiment
    try:
        before = load_saved(file).model
    except ConfigError:
        return experiment  # it is written anew
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


def _make_way(stage: PlannedStage, standing: Standing) -> None:
    """Clear the folder of a stage for what is due: move aside the result of something else, undo that of the same."""
    if standing.outdated:
        found = None if unreadable(stage.folder) else read_manifest(stage.folder) or read_stage_file(stage.folder)
        name = f"{stage.folder.name}-{'unreadable' if found is None else found['key'][:8]}"
        place = stage.folder.parent / SUPERSEDED / name
        number = 1
        while place.exists():
            number += 1
            place = place.with_name(f"{name}-{number}")
        place.parent.mkdir(exist_ok=True)
        stage.folder.rename(place)
        flush_to_disk(place.parent)
    elif stage.folder.is_dir():  # what else is there is for the stage to complain of
        (stage.folder / MANIFEST).unlink(missing_ok=True)
        flush_to_disk(stage.folder)  # a manifest that came back would declare what is about to be written over


class _Trace(NamedTuple):
    """What an earlier run of a stage has left, to be told from what this one leaves; no clock need be right for it."""

    state: dict[str, Any] | None
    log_bytes: int

    @staticmethod
    def of(stage: PlannedStage) -> _Trace:
        log = stage.folder / LOG
        return _Trace(read_stage_file(stage.folder), log.stat().st_size if log.is_file() else 0)


def _look_back(
    due: dict[StageId, PlannedStage],
    before: dict[StageId, _Trace],
    found: dict[StageId, Standing],
    ended: Ended,
    begun: dict[StageId, Begun],
) -> tuple[dict[StageId, Failure], str]:
    """Which of the stages that were due have failed, and why; and what went wrong with Snakemake, if it left others."""
    failed, left = {}, False
    for stage_id, stage in due.items():
        if found[stage_id].made:
            continue
        if stage_id not in begun and stage_id not in ended.of_jobs:
            left = left or all(need not in due or found[need].made for need in stage.needs.values())
            continue
        error = _error(stage, before[stage_id], begun.get(stage_id, _NOT_BEGUN), ended)
        if error is None:
            left = True
        else:
            failed[stage_id] = Failure(stage.folder, error)
    return failed, ended.in_words() if left else ""


def _error(stage: PlannedStage, before: _Trace, begun: Begun, ended: Ended) -> str | None:
    """Why a stage failed that was begun; None if it did not, but ended with Snakemake."""
    now = _Trace.of(stage)
    state = None if now.state == before.state else now.state
    if disk_is_full(stage.folder.parent):
        return f"the disk is full ({os.strerror(errno.ENOSPC)}). {AFTER_DISK_FULL}"
    if state is not None and state["status"] == "failed":
        return state.get("error", "")
    if begun.exit_code == ORPHANED or (begun.exit_code is None and ended.killed):
        return None
    said = _said(stage.folder / LOG, before.log_bytes)
    if stage.id in ended.of_jobs:
        return "\n".join([ended.of_jobs[stage.id], *said])
    signal = (begun.exit_code or 0) - 128
    if begun.exit_code is None or signal == SIGKILL:
        return "\n".join(["its process was killed; most often the machine ran out of memory", *said])
    if signal > 0:
        return "\n".join([f"its process was ended by signal {signal_name(signal)}", *said])
    if begun.complaint:
        return begun.complaint
    if not said:
        return f"its process ended with exit code {begun.exit_code} and said nothing"
    return "\n".join(said)


def _said(log: Path, from_byte: int) -> list[str]:
    """The last lines that a stage has added to its log; of a traceback first the last, which is the error."""
    if not log.is_file():
        return []
    text = log.read_bytes()[from_byte:].decode("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-_LAST_LINES:]
    return [last[-1], *last[:-1]] if "Traceback (most recent call last):" in lines else last


def _write_plan(planned: dict[StageId, PlannedStage], failed: dict[StageId, Failure], run_dir: Path) -> None:
    """The plan as the progress reads it, also from another process, and wherever the run folder lies by then."""

    def entry(stage_id: StageId, folder: Path) -> dict[str, str]:
        return {"stage": stage_id.stage, "folder": folder.relative_to(run_dir).as_posix()}

    stages = {str(stage_id): entry(stage_id, stage.folder) for stage_id, stage in planned.items()}
    for stage_id, failure in failed.items():
        error = {"error": failure.error} if stage_id not in planned else {}
        stages[str(stage_id)] = {**entry(stage_id, failure.folder), **error}
    with written_whole(run_dir / PLAN) as partial:
        partial.write_text(json.dumps({"stages": stages}, indent=1, ensure_ascii=False), encoding="utf-8")
