"""Measure every trained policy of a run folder, and the references they started from, on tasks of the harness.

What is measured already is skipped; a process per model asks the rest, and each task's result is kept as it comes. A
result counts as known for the same weights, precision, task, examples, limit and version of the harness, whichever
experiment of the folder it stands in: so a shared reference is measured once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from epsdpo.evaluation.benchmarks.results import POLICY, REFERENCE, percent, read_results, training_of, write_results
from epsdpo.evaluation.benchmarks.tasks import Task
from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment
from epsdpo.models.hub import model_identity
from epsdpo.models.own_code import require_no_own_code
from epsdpo.models.start import start_of
from epsdpo.runs.fingerprint import key_of
from epsdpo.runs.layout import BENCHMARKS, experiments_in
from epsdpo.runs.manifest import read_manifest

LOG = "harness.log"


@dataclass(frozen=True)
class Model:
    """A model of a run: the policy of an experiment, or the reference that it started from."""

    experiment: Experiment
    folder: Path
    role: str
    source: str
    revision: str | None

    @property
    def name(self) -> str:
        return f"{self.experiment.name}/{self.role}"


@dataclass(frozen=True)
class Question:
    """A task as one model is asked it; `key` covers all that decides the answer."""

    task: Task
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        return key_of(self.facts)


def measure_run(
    run_dir: Path, tasks: list[Task], limit: int | None = None, include_path: str = "", show: Callable = print
) -> list[str]:
    """Bring `<experiment>/benchmarks/results.json` of every trained experiment up to date.

    Args:
        limit: ask only the first questions of each task; such results are kept apart from whole ones, and shown as what
            they are.
        include_path: folder of tasks of one's own, as YAML files of the harness.
        show: is given lines of progress.

    Returns:
        What failed, in a line each. What succeeded is kept, and the same call measures the rest.

    Raises:
        ConfigError: before any work, if the harness is not installed, no experiment of the folder is trained, or a
            model needs code of its own.
    """
    asked_with = {"limit": limit, "harness": harness_version(), "own_tasks": _content_of(include_path)}
    models = list(_models(run_dir, show))
    require_no_own_code(
        [model.experiment for model in models], [Path(model.source) for model in models if model.role == POLICY]
    )
    failures = []
    for place, model in enumerate(models, start=1):
        show(f"[{place}/{len(models)}] {model.name}: {model.source}")
        try:
            identity = model_identity(model.source, model.revision)
        except OSError as error:
            failures.append(f"{model.name}: {error}")
            continue
        asked = {"model": identity, "dtype": model.experiment.model.dtype, **asked_with}
        questions = {task.name: Question(task, {**asked, "task": task.name, "shots": task.shots}) for task in tasks}
        known, due = _sort_out(run_dir, model, identity, questions)
        for measurement in known:
            show(f"  {measurement['label']}: {percent(measurement)}, measured before")
        failures += _measure(model, due, limit, include_path, show)
    return failures


def harness_version() -> str:
    """The version of lm-evaluation-harness.

    Raises:
        ConfigError: if it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "benchmark: lm-evaluation-harness is not installed. It is an extra of its own: "
            "pip install 'epsdpo[benchmarks]', or from a checkout pip install -e '.[benchmarks]'"
        )
    return importlib.metadata.version("lm_eval")


def _models(run_dir: Path, show: Callable) -> Iterator[Model]:
    trained = []
    for name, experiment in experiments_in(run_dir).items():
        if read_manifest(run_dir / name / "train") is not None:
            trained.append(experiment)
        else:
            show(f"{name} is not trained yet, and left out")
    if not trained:
        raise ConfigError(f"{run_dir} holds no trained experiment. Give the folder of `epsdpo run`, e.g. runs/demo")
    for experiment in trained:
        folder = run_dir / experiment.name
        yield Model(experiment, folder, REFERENCE, *start_of(experiment))
        yield Model(experiment, folder, POLICY, str(folder / "train" / "model"), None)


def _content_of(folder: str) -> str | None:
    """A digest of the files below a folder of tasks, or None without one."""
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise ConfigError(f"--include-path {folder}: no such folder; give one with task files of the harness")
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        digest.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _sort_out(
    run_dir: Path, model: Model, identity: dict[str, str], questions: dict[str, Question]
) -> tuple[list[dict[str, Any]], dict[str, Question]]:
    """Take over what any experiment of the folder knows of these weights; return that, and what nobody knows."""
    every = [
        measurement
        for folder in sorted(run_dir.glob(f"*/{BENCHMARKS}"))
        for measurements in read_results(folder.parent).values()
        for measurement in measurements
    ]
    by_key = {measurement["key"]: measurement for measurement in every}
    known = {name: by_key[question.key] for name, question in questions.items() if question.key in by_key}
    own = {m["key"]: m for m in read_results(model.folder)[model.role] if m["model"] == identity}
    _keep(model, own | {measurement["key"]: measurement for measurement in known.values()})
    return list(known.values()), {name: question for name, question in questions.items() if name not in known}


def _keep(model: Model, measurements: dict[str, dict[str, Any]]) -> None:
    training = training_of(model.folder) if model.role == POLICY else None
    kept = [{**measurement, "training": training} for measurement in measurements.values()]
    write_results(model.folder, {**read_results(model.folder), model.role: kept})


def _measure(model: Model, due: dict[str, Question], limit: int | None, include_path: str, show: Callable) -> list[str]:
    """Ask one model what is due, keeping each answer as it comes, and return what failed."""
    if not due:
        return []
    job = {
        "experiment_file": str(model.folder / EXPERIMENT_FILE),
        "source": model.source,
        "revision": model.revision,
        "tasks": [asdict(question.task) for question in due.values()],
        "limit": limit,
        "include_path": include_path,
    }
    command = [sys.executable, "-m", "epsdpo.evaluation.benchmarks.harness", json.dumps(job)]
    log_file = model.folder / BENCHMARKS / LOG
    show(f"  measuring {', '.join(due)}; its log: {log_file}")
    failures, open_tasks = [], list(due)
    with log_file.open("ab") as log:
        # Its standard input is held open and never written to: the process ends when that closes.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
        )
        try:
            for line in process.stdout:
                answer = json.loads(line)
                question = due[answer.pop("task")]
                open_tasks.remove(question.task.name)
                if "error" in answer:
                    failures.append(f"{model.name}: {question.task.name}: {answer['error']}")
                    show(f"  {question.task.label}: failed")
                    continue
                finished = datetime.now(UTC).isoformat(timespec="seconds")
                measurement = {
                    "key": question.key,
                    "label": question.task.label,
                    **question.facts,
                    **answer,
                    "finished": finished,
                }
                _keep(model, {m["key"]: m for m in [*read_results(model.folder)[model.role], measurement]})
                show(f"  {question.task.label}: {percent(measurement)} ({answer['seconds']:.0f} s)")
        finally:
            process.stdin.close()
            process.wait()
    if open_tasks:
        failures.append(
            f"{model.name}: {', '.join(open_tasks)}: its process ended with exit code {process.returncode}. "
            f"See {log_file}; the same command tries again"
        )
    return failures
