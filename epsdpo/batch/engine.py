"""Snakemake: what it is told of a batch, and what is known of it and of each stage once it has ended.

Users name folders as they like, and Snakemake reads patterns into paths and commands. So it is told nothing that a user
has named: manifests by their paths from its own folder, which hold the names of stages alone, and of each command only
the name of a script.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from epsdpo.batch import warm_client
from epsdpo.batch.index import write_index
from epsdpo.batch.progress import NOTICES, Display, follow
from epsdpo.batch.specs import STAGES, PlannedStage, StageId
from epsdpo.batch.warm import WarmProcess
from epsdpo.files import written_whole
from epsdpo.runs.layout import NOTEBOOKS, STATE_FOLDER
from epsdpo.runs.manifest import LOG, MANIFEST, TRAININGS
from epsdpo.runs.preempted import PREEMPTED

_CLIENT = Path(warm_client.__file__).resolve()
_WORKFLOW = Path(__file__).with_name("workflow.smk")
ENGINE_LOG = Path(STATE_FOLDER) / "snakemake.log"  # in the run folder
_BATCH_FILE = "batch.json"
_SCRIPTS = "stages"  # a script for each stage that is due, and what it leaves: see `_script`
_SCRATCH = "scratch"  # where Snakemake makes its temporary folders, which it leaves behind when it is killed
# What Snakemake takes to be the same for it and for the stages: all but its cache of sources, which it would put into
# the user's home, and leave open there when it is killed.
_SHARED = ("persistence", "input-output", "software-deployment", "sources", "storage-local-copies")
_OMP_THREADS = "OMP_NUM_THREADS"
# What Snakemake sets to the threads of a rule: one, unless a stage is alone. Torch asks MKL for its number where it is
# built with that, so that OpenMP's does not suffice.
_RULE_THREADS = (
    _OMP_THREADS,
    "GOTO_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
_EXIT = "exit code: "
_LAST_LINES = 5
# What Snakemake says of a job that failed, if it is told of jobs.
_OF_JOB = re.compile(r"^Error in rule (.+):\n +message: ((?:.*\n)+?) +jobid: ", re.MULTILINE)
_NOTHING = "None\n"
# Of a training that was told to end before its job is over, and has saved a checkpoint. A job that was cancelled, or is
# over, does not run by then, and is left so.
_BACK_INTO_THE_QUEUE = f"""\
if [ $code = {PREEMPTED} ] && [ "$(squeue --noheader --format=%T --jobs="${{SLURM_JOB_ID:-}}")" = RUNNING ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi"""


@dataclass(frozen=True)
class Resources:
    """Where a batch runs.

    Attributes:
        jobs: stages at once on this machine.
        gpus: GPUs to share out, one to a stage (or `num_processes` to a launched training); 0 leaves GPUs alone.
        time_limit: hours that a stage may take, or None.
        profile: folder of a Snakemake profile, which submits the stages to a cluster; "" runs them here.
        launch_config, num_processes: how training processes are launched, by accelerate.
    """

    jobs: int = 1
    gpus: int = 0
    time_limit: float | None = None
    profile: str = ""
    launch_config: str = ""
    num_processes: int = 0


ONE_AT_A_TIME = Resources()


class Ended(NamedTuple):
    """How Snakemake ended.

    Attributes:
        code: its exit code, minus the signal if it was one.
        last_lines: the end of what it said.
        of_jobs: what a cluster, or who submits to it, said of stages that failed: could not be submitted, was
            cancelled, ran out of time.
    """

    code: int
    last_lines: str
    of_jobs: dict[StageId, str]

    @property
    def killed(self) -> bool:
        return self.code < 0

    def in_words(self) -> str:
        if self.killed:
            return f"Snakemake, which runs the stages, was ended by signal {signal_name(-self.code)}"
        return f"Snakemake, which runs the stages, ended with exit code {self.code}:\n{self.last_lines}"


class Begun(NamedTuple):
    """What is known of a stage that Snakemake has begun.

    Attributes:
        complaint: of the shell that was to start it: a folder or a log that cannot be written, a command not found.
        exit_code: of its process; None if not even the shell lived to see it.
    """

    complaint: str
    exit_code: int | None


def run_due(due: dict[StageId, PlannedStage], run_dir: Path, resources: Resources, display: Display) -> Ended:
    """Have Snakemake run stages, and show how they come along until it ends."""
    state = run_dir / STATE_FOLDER
    for folder in (state / _SCRIPTS, state / _SCRATCH):
        shutil.rmtree(folder, ignore_errors=True)
    (state / _SCRIPTS).mkdir()
    (state / _SCRATCH).mkdir(exist_ok=True)  # the last Snakemake may have to end yet
    (run_dir / NOTICES).unlink(missing_ok=True)
    rules = [_rule(stage, due, run_dir, resources) for stage in due.values()]
    for place, rule in enumerate(reversed(rules)):
        rule["priority"] = place  # in the order of the plan, where there is a choice
    with written_whole(state / _BATCH_FILE) as partial:
        partial.write_text(json.dumps(rules, indent=1), encoding="utf-8")
    environment = _environment(resources)
    with (run_dir / ENGINE_LOG).open("ab") as log, contextlib.ExitStack() as ends:
        said_before = log.tell()
        warm = _warm_process(due, resources, environment, log)
        if warm is not None:
            ends.callback(warm.end)
        for stage in due.values():
            script = _script(stage, state, resources, warm)
            (state / _SCRIPTS / f"{_rule_name(stage.id)}.sh").write_bytes(os.fsencode(script))
        process = subprocess.Popen(
            _command(state, resources),
            # Held open and never written to: Snakemake and the stages below it end when it closes, which it does
            # however this process ends.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment if resources.profile else {**environment, "TMPDIR": str((state / _SCRATCH).resolve())},
            start_new_session=True,  # an interrupt of the terminal comes by way of this process
        )
        try:
            with display:
                follow(process, display, lambda: write_index(run_dir))
        finally:
            process.stdin.close()
            process.wait()
            shutil.rmtree(state / _SCRATCH, ignore_errors=True)
    said = (run_dir / ENGINE_LOG).read_bytes()[said_before:].decode("utf-8", errors="replace")
    # Without the options that it lists when it is called wrongly.
    lines = [line for line in said.splitlines() if line.strip() and not line.lstrip().startswith("[")]
    return Ended(process.returncode, "\n".join(lines[-_LAST_LINES:]), _of_jobs(said, due))


def begun_stages(due: dict[StageId, PlannedStage], run_dir: Path) -> dict[StageId, Begun]:
    """Those of the stages given to `run_due` that were begun."""
    begun = {}
    for stage_id in due:
        mark = _mark(run_dir / STATE_FOLDER / _SCRIPTS, stage_id)
        if mark.exists():
            complaint, *code = mark.read_text(encoding="utf-8", errors="replace").split(_EXIT)
            begun[stage_id] = Begun(complaint.strip(), int(code[-1]) if code else None)
    return begun


def _of_jobs(said: str, due: dict[StageId, PlannedStage]) -> dict[StageId, str]:
    by_rule = dict(_OF_JOB.findall(said))
    found = {stage_id: by_rule.get(_rule_name(stage_id), _NOTHING) for stage_id in due}
    return {stage_id: text.strip() for stage_id, text in found.items() if text != _NOTHING}


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _command(state: Path, resources: Resources) -> list[str]:
    command = [sys.executable, "-m", "epsdpo.batch.workflow", "--snakefile", str(_WORKFLOW.resolve())]
    command += ["--directory", str(state.resolve())]
    # Snakemake is told of due stages only, and need not find out for itself what has changed. Profiles that a user has
    # for workflows of his own are not meant for this one.
    command += ["--rerun-triggers", "mtime", "--keep-going", "--nolock", "--workflow-profile", "none"]
    command += ["--quiet", "host", "progress", "reason"]  # "all" would leave out its errors, too
    if resources.profile:
        return [*command, "--profile", str(Path(resources.profile).resolve()), "--jobs", str(resources.jobs)]
    # With them what a cluster says of its jobs; of those here nothing is said that is not known.
    command += ["rules", "--cores", str(resources.jobs)]
    if resources.gpus:
        command += ["--resources", f"gpu={resources.gpus}"]
    return [*command, "--shared-fs-usage", *_SHARED]


def _warm_process(
    due: dict[StageId, PlannedStage], resources: Resources, environment: dict[str, str], log: IO[bytes]
) -> WarmProcess | None:
    """One that has imported what these stages will, on this machine.

    Launched training has processes of its own. A stage with all cores is begun anew: libraries choose their threads as
    they are imported.
    """
    forks = [stage for stage in due.values() if not _is_alone(stage, resources)]
    if resources.profile or resources.launch_config or sys.platform != "linux" or not forks:
        return None
    notebooks = dict.fromkeys(NOTEBOOKS / STAGES[stage.stage].notebook for stage in forks)
    methods = dict.fromkeys(stage.method for stage in forks if stage.method)
    return WarmProcess([*notebooks], [*methods], {**environment, **dict.fromkeys(_RULE_THREADS, "1")}, log)


def _environment(resources: Resources) -> dict[str, str]:
    environment = {**os.environ, "SNAKEMAKE_OUTPUT_CACHE": ""}
    environment.pop("SNAKEMAKE_PROFILE", None)
    if resources.jobs > 1:
        environment.setdefault(_OMP_THREADS, str(max(1, (os.cpu_count() or 1) // resources.jobs)))
    return environment


def _rule(stage: PlannedStage, due: dict[StageId, PlannedStage], run_dir: Path, resources: Resources) -> dict[str, Any]:
    def manifest(of: PlannedStage) -> str:
        return (Path("..") / of.folder.relative_to(run_dir) / MANIFEST).as_posix()

    return {
        "name": _rule_name(stage.id),
        "manifest": manifest(stage),
        "needs": [manifest(due[need]) for need in stage.needs.values() if need in due],
        "threads": resources.jobs if _is_alone(stage, resources) else 1,
        "gpus": _gpus(stage, resources),
        "minutes": math.ceil(60 * (resources.time_limit or 24)),
    }


def _script(stage: PlannedStage, state: Path, resources: Resources, warm: WarmProcess | None) -> str:
    """Shell that runs a stage. It leaves a file that says that the stage was begun, and in the end its exit code.

    Told to end with all of a job, it waits for the stage, and has Slurm run the job again if a training has saved.
    """
    # With = in between, a name may begin with a dash.
    command = [sys.executable, "-m", "epsdpo", "stage", stage.stage, f"--output={stage.folder}"]
    command += [f"--parameter={name}={json.dumps(value)}" for name, value in stage.parameters.items()]
    if resources.time_limit is not None:
        command += [f"--time-limit={resources.time_limit:g}"]
    if not resources.profile:
        command += ["--end-with-stdin"]
        if resources.gpus and _gpus(stage, resources):
            command += [f"--take-gpus={_gpus(stage, resources)}/{resources.gpus}"]
    alone = _is_alone(stage, resources)
    if warm is not None and not alone:
        notices = (state.parent / NOTICES).resolve()
        command = [sys.executable, "-I", "-S", str(_CLIENT), warm.address, str(notices), *command]
    mark = _mark(state / _SCRIPTS, stage.id).resolve()
    all_cores = alone and _OMP_THREADS not in os.environ
    threads = " ".join(f"{name}={os.cpu_count() or 1}" for name in _RULE_THREADS)
    here, mark, folder, log = (shlex.quote(str(path)) for path in (Path.cwd(), mark, stage.folder, stage.folder / LOG))
    return f"""\
code=0
{"trap : TERM" if resources.profile else ""}
{{
{"" if resources.profile else _own_temporary_folder()}
{f"export {threads}" if all_cores else ""}
cd -- {here} && mkdir -p -- {folder} && {shlex.join(command)} >> {log} 2>&1
}} 2> {mark} || code=$?
echo "{_EXIT}$code" >> {mark}
{_BACK_INTO_THE_QUEUE if resources.profile else ""}
exit $code
"""


def _own_temporary_folder() -> str:
    """Shell that gives a stage back what Snakemake has been told to use for itself."""
    return "\n".join(
        f"export {name}={shlex.quote(os.environ[name])}" if name in os.environ else f"unset {name}"
        for name in _TEMPORARY
    )


def _is_alone(stage: PlannedStage, resources: Resources) -> bool:
    return STAGES[stage.stage].alone and not resources.profile


def _gpus(stage: PlannedStage, resources: Resources) -> int:
    if not STAGES[stage.stage].on_gpu:
        return 0
    return max(1, resources.num_processes) if stage.stage in TRAININGS else 1


def _rule_name(stage_id: StageId) -> str:
    return "__".join(stage_id)


def _mark(scripts: Path, stage_id: StageId) -> Path:
    return scripts / f"{_rule_name(stage_id)}.begun"
