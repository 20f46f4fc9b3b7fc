"""One stage of a run: a parameterised notebook, executed headless, with its HTML and its manifest."""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat

from epsdpo.batch.jupyter import execute
from epsdpo.batch.notebook_page import write_page
from epsdpo.batch.progress import progress_mark
from epsdpo.batch.specs import STAGES, code_digests, inputs_of_run, settings_of
from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, load_saved, load_variant
from epsdpo.experiment.paths import REPOSITORY, output_path, resolve_path
from epsdpo.experiment.values import number_advice
from epsdpo.methods.record import first_step, incompleteness, read_criterion
from epsdpo.models.local_models import gguf_facts
from epsdpo.models.own_code import require_no_own_code
from epsdpo.runs.fingerprint import key_parts
from epsdpo.runs.layout import EXECUTED, MODEL_FOLDER, NOTEBOOKS, PAGE, experiment_of, kept_in
from epsdpo.runs.manifest import (
    LOG,
    MANIFEST,
    TRAININGS,
    experiment_facts,
    read_manifest,
    write_manifest,
    write_stage_file,
)
from epsdpo.runs.verify import check_inputs

TIMED_OUT = 124  # the exit code of `timeout`

_KINDS = {kind.__name__: kind for kind in (str, int, float, bool, list)}


class StageError(RuntimeError):
    """A stage that did not finish. The message names the stage, the error and the notebook to look at."""


@dataclass(frozen=True)
class Parameter:
    """One typed assignment in a notebook's `parameters` cell."""

    kind: type
    required: bool


def read_parameters(notebook: Path) -> dict[str, Parameter]:
    """What a notebook's `parameters` cell declares: `name: type = default`, or `name: type` for what must be given.

    Raises:
        StageError: if the notebook has not exactly one such cell, or the cell holds anything but such assignments.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise StageError(f"{notebook}: {len(tagged)} cells are tagged 'parameters'; tag exactly one")
    parameters = {}
    for statement in ast.parse(tagged[0].source).body:
        match statement:
            case ast.AnnAssign(target=ast.Name(name), annotation=ast.Name(kind)) if kind in _KINDS:
                parameters[name] = Parameter(_KINDS[kind], required=statement.value is None)
            case _:
                raise StageError(
                    f"{notebook}: {ast.unparse(statement)!r} in the 'parameters' cell has no type; "
                    f"write `name: type = default` with one of {', '.join(_KINDS)}"
                )
    return parameters


def check_parameters(notebook: Path, values: dict[str, Any]) -> dict[str, Any]:
    """`values` as the notebook wants them; an int is accepted for a float, and nothing else is converted.

    Raises:
        ConfigError: listing every unknown, missing or mistyped parameter with its remedy.
    """
    declared = read_parameters(notebook)
    problems = [
        f"parameter {name!r} is missing; give it a {parameter.kind.__name__}"
        for name, parameter in declared.items()
        if parameter.required and name not in values
    ]
    checked = {}
    for name, value in values.items():
        if name not in declared:
            nearest = difflib.get_close_matches(name, declared, n=1) or sorted(declared)
            problems.append(f"parameter {name!r} is unknown; did you mean {' or '.join(map(repr, nearest))}?")
            continue
        kind = declared[name].kind
        if type(value) is kind or (kind is float and type(value) is int):
            checked[name] = kind(value)
        else:
            advice = number_advice(value, kind) if kind in (int, float) else ""
            problems.append(
                f"parameter {name!r} is {value!r} of type {type(value).__name__}; expected {kind.__name__}"
                + (f". {advice}" if advice else "")
            )
    if problems:
        raise ConfigError("\n".join(f"{notebook.name}: {problem}" for problem in problems))
    return checked


def run_stage(stage: str, parameters: dict[str, Any], output_dir: str | Path, time_limit: float | None = None) -> Path:
    """Execute the notebook of `stage` headless and return the path of the manifest that declares it finished.

    `output_dir` receives `notebook.ipynb`, `notebook.html` (without code, readable offline) and, last, `manifest.json`,
    beside what the notebook itself writes there; it is passed to the notebook as `output_dir`. Files of an earlier,
    interrupted run stay, for the notebook to resume from. What the notebook prints is passed on as it comes. The
    notebook runs in the working directory of the caller, so relative paths mean the same inside and outside. While it
    runs, and after it failed, `stage.json` says so.

    Args:
        time_limit: hours after which this whole process is ended, with exit code 124.

    Raises:
        ConfigError: before a kernel starts, if a parameter is unknown, missing or mistyped, or an input is not there or
            no longer as its stage left it.
        StageError: if the notebook is not there, a cell fails, or the kernel dies. No manifest is left.
    """
    output_dir = Path(output_dir)
    notebook = NOTEBOOKS / STAGES[stage].notebook
    if not notebook.is_file():
        raise StageError(f"stage {stage}: {notebook} is not there; run from a checkout with `pip install -e .`")
    # A notebook that runs where it lies would take a relative folder from the repository's root.
    written_to = output_dir if output_path(output_dir) == output_dir else output_dir.resolve()
    parameters = check_parameters(notebook, {**parameters, "output_dir": str(written_to)})
    inputs, experiment = _inputs(parameters), _experiment(parameters)
    check_inputs(inputs, output_dir)
    require_no_own_code(
        [] if experiment is None else [experiment],
        [folder / MODEL_FOLDER for folder in inputs if (folder / MODEL_FOLDER).is_dir()],
    )
    settings, inputs_by_role = _settings_and_inputs(stage, parameters, experiment)
    code = code_digests(stage, notebook, "" if experiment is None else experiment.method)
    parts = key_parts(settings, code, inputs_by_role)

    output_dir.mkdir(parents=True, exist_ok=True)
    executed, page = output_dir / EXECUTED, output_dir / PAGE
    for left_over in (output_dir / MANIFEST, executed, page):
        left_over.unlink(missing_ok=True)
    started = datetime.now(UTC)
    state = {"stage": stage, "parts": parts, "started": started, **_left_by_others(output_dir)}
    write_stage_file(output_dir, **state)

    def fail(problem: str, exit_code: int) -> None:
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        write_stage_file(output_dir, **state, status="failed", error=problem, exit_code=exit_code, ended=ended)

    with _limited(time_limit, fail):
        problem = execute(notebook, executed, parameters)
    write_page(executed, page, title=_title(stage, output_dir, experiment))
    if problem:
        fail(problem, exit_code=1)
        raise StageError(f"stage {stage} failed: {problem}\nexecuted notebook: {executed}\nto read it: {page}")
    return write_manifest(
        output_dir,
        stage=stage,
        parameters=parameters,
        facts={**({} if experiment is None else _facts(experiment)), **_record_facts(stage, output_dir)},
        parts=parts,
        inputs=inputs,
        started=started,
        repository=REPOSITORY,
    )


def renew_report(run_dir: Path) -> list[str]:
    """Make the report of a run folder again if it shows other results than there are; return what failed."""
    report = run_dir / "report"
    manifest = read_manifest(report)
    there_are = inputs_of_run("report", run_dir, kept_in(run_dir))
    if manifest is None or manifest.get("key_parts", {}).get("inputs") == there_are:
        return []
    try:
        run_stage("report", {"run_dir": str(run_dir), "links_from": str(report)}, report)
    except StageError as error:
        return [str(error)]
    return []


def _left_by_others(output_dir: Path) -> dict[str, Any]:
    """What lies in the folder as a stage begins, so that none of it is taken for this process's progress."""
    log = output_dir / LOG
    return {"log_bytes": log.stat().st_size if log.is_file() else 0, "progress": progress_mark(output_dir)}


@contextlib.contextmanager
def _limited(hours: float | None, fail: Callable[[str, int], None]) -> Iterator[None]:
    """End this process if the block takes longer. The kernel, and training that it launched, end with it."""

    def end() -> None:
        problem = f"it took longer than its time limit of {hours:g} hours; the same command continues it"
        fail(problem, TIMED_OUT)
        print(problem, file=sys.stderr, flush=True)
        os._exit(TIMED_OUT)

    timer = None if hours is None else threading.Timer(3600 * hours, end)
    try:
        if timer is not None:
            timer.daemon = True
            timer.start()
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _inputs(parameters: dict[str, Any]) -> list[Path]:
    """The files and folders among the parameters. By convention these are `config`, `compare_with`, `*_dir` and `runs`.

    `launch_config` is not among them: it says where a run is computed, not what, and is recorded by its name.
    """
    names = [name for name in parameters if name in ("config", "compare_with") or name.endswith("_dir")]
    paths = [parameters[name] for name in names if name != "output_dir" and parameters[name]]
    return [resolve_path(path) for path in (*paths, *parameters.get("runs", []))]


def _facts(experiment: Experiment) -> dict[str, Any]:
    """What a manifest says of the experiment, and of the GGUF files that it names."""
    files = gguf_facts(experiment)
    return {**experiment_facts(experiment), **({"gguf": files} if files else {})}


def _record_facts(stage: str, output_dir: Path) -> dict[str, Any]:
    """What a manifest says of a training's record: its arithmetic, and whether it was begun anew in the middle."""
    if stage not in TRAININGS:
        return {}
    criterion, problem = read_criterion(output_dir), incompleteness(output_dir)
    anew = {"record": {"first_step": first_step(output_dir), "problem": problem}} if problem else {}
    return ({"criterion": criterion} if criterion else {}) | anew


def _experiment(parameters: dict[str, Any]) -> Experiment | None:
    """The experiment behind a stage, where its parameters lead to one."""
    if parameters.get("config"):
        config, overrides = resolve_path(parameters["config"]), parameters.get("overrides")
        checked = config.name == EXPERIMENT_FILE and not overrides
        return load_saved(config) if checked else load_variant(config, overrides)
    return experiment_of(resolve_path(parameters["train_dir"])) if "train_dir" in parameters else None


def _settings_and_inputs(
    stage: str, parameters: dict[str, Any], experiment: Experiment | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What decides the result of a stage, of settings and of earlier stages, as the plan of a batch foresees it."""
    spec = STAGES[stage]
    # Batches make figures for the page, and do not know of others: after a print version, the stage is due again.
    figures = {"publication": True} if parameters.get("publication") else {}
    if spec.joins is not None:
        if not parameters.get("run_dir"):
            raise ConfigError(
                f"stage {stage}: parameter 'run_dir' is missing; give the folder of a run, e.g. runs/demo"
            )
        run_dir = resolve_path(parameters["run_dir"])
        return {**spec.settings_of_run(run_dir, (), None), **figures}, inputs_of_run(stage, run_dir, kept_in(run_dir))
    folders = {role: resolve_path(parameters[name]) for role, name in spec.reads.items() if parameters.get(name)}
    inputs = {}
    for role, folder in folders.items():
        manifest = read_manifest(folder)
        inputs[role] = "not made by a stage" if manifest is None else manifest["key"]
    if experiment is None:
        return {name: value for name, value in parameters.items() if name != "output_dir"}, inputs
    baseline = experiment_of(folders["baseline"]) if "baseline" in folders else None
    return {**settings_of(stage, experiment, baseline), **figures}, inputs


def _title(stage: str, output_dir: Path, experiment: Experiment | None) -> str:
    """How a browser's tab calls the page of a stage; what several experiments share is called by its folder."""
    folder = output_dir.resolve()
    whose = experiment.title if experiment is not None and STAGES[stage].of_one_experiment else folder.name
    return f"{whose} · {stage}" if whose != stage else f"{stage} · {folder.parent.name}"
