"""Many experiments, one after the other: from a config file or folder to one report.

This module knows the order of the stages, which of them experiments share, and what a failure stops. How one stage is
run is the business of `epsdpo.stages`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, claim_folder, load_experiments
from epsdpo.launch import launcher_command
from epsdpo.manifest import MANIFEST
from epsdpo.models import pin_revision
from epsdpo.paths import resolve_path
from epsdpo.stages import PAGE, StageError, run_stage

logger = logging.getLogger(__name__)

REPORT = "report"


def run_batch(
    config_paths: str | Path | Sequence[str | Path],
    output_dir: str | Path | None = None,
    launch_config: str = "",
    num_processes: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Run every experiment of config files and folders, then the report that joins them; return the report's HTML.

    Args:
        config_paths: YAML files, or folders of them.
        output_dir: the run folder; default `runs/<names of the files and folders, joined by +>`, from the working
            directory.
        launch_config: an accelerate config file, to train in processes of their own; "" trains in the notebook's.
        num_processes: how many of them; 0 for as many as `launch_config` says.
        overrides: dotted keys with the values that they take in every experiment.

    Raises:
        ConfigError: before any work, if a config is wrong or cannot be launched so, or the run folder holds results of
            a different config.
        StageError: after everything that could be run has been run, with a table of the stages that failed.
    """
    config_paths = [config_paths] if isinstance(config_paths, (str, Path)) else config_paths
    config_paths = [resolve_path(path) for path in config_paths]
    name = "+".join(path.resolve().name.removesuffix(".yaml") for path in config_paths)
    run_dir = Path(output_dir) if output_dir else Path("runs") / name
    experiments = load_experiments(config_paths, overrides)
    # The baselines first, so that the others can be shown beside them.
    experiments.sort(key=lambda experiment: experiment.method != "dpo")
    _check_names(experiments)
    for experiment in experiments:
        launcher_command(launch_config, num_processes, experiment)
    launch = {"launch_config": launch_config, "num_processes": num_processes} if launch_config else {}
    experiments = [claim_folder(experiment, run_dir / experiment.name, pin_revision) for experiment in experiments]

    progress = _Progress(_plan(experiments))
    prepared: dict[Path, bool] = {}
    baselines: dict[Path, Path] = {}
    for experiment in experiments:
        config = str(run_dir / experiment.name / EXPERIMENT_FILE)
        data_dir = run_dir / data_folder(experiment)
        if data_dir not in prepared:
            prepared[data_dir] = progress.run(data_dir.name, "prepare", {"config": config}, data_dir)
        if prepared[data_dir]:
            _run_experiment(experiment, config, run_dir, data_dir, launch, baselines, progress)
    if progress.trained():
        progress.run(REPORT, "report", {"run_dir": str(run_dir)}, run_dir / REPORT)
    progress.raise_for_failures()
    return run_dir / REPORT / PAGE


def data_folder(experiment: Experiment) -> str:
    """Name of the prepared-data folder: experiments whose data would come out the same share one."""
    decisive = {
        "data": experiment.data.model_dump(),
        "model": experiment.model.model_dump(),
        "max_length": experiment.max_length,
    }
    return "data-" + hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


def _run_experiment(
    experiment: Experiment,
    config: str,
    run_dir: Path,
    data_dir: Path,
    launch: dict[str, Any],
    baselines: dict[Path, Path],
    progress: _Progress,
) -> None:
    """Train, trajectory and evaluation of one experiment; the first that fails ends it.

    `launch` holds the parameters of training that say where it is computed. `baselines` holds, for each prepared data
    set, the first DPO run trained on it: only such runs have pairs in common.
    """
    folder, data = run_dir / experiment.name, str(data_dir)
    train_dir = folder / "train"
    parameters: dict[str, Any] = {"config": config, "data_dir": data, "live": False, **launch}
    if (train_dir / MANIFEST).exists():
        # Training would find its model there; a new manifest would credit that model to today's code.
        progress.keep(experiment.name, "train", train_dir)
    elif not progress.run(experiment.name, "train", parameters, train_dir):
        return
    if experiment.method == "dpo":
        baselines.setdefault(data_dir, train_dir)
    baseline = baselines.get(data_dir, train_dir)
    parameters = {
        "train_dir": str(train_dir),
        "compare_with": "" if baseline == train_dir else str(baseline),
        "data_dir": data,
    }
    if not progress.run(experiment.name, "trajectory", parameters, folder / "trajectory"):
        return
    if experiment.evaluate is not None:
        parameters = {"config": config, "data_dir": data, "train_dir": str(train_dir)}
        progress.run(experiment.name, "evaluate", parameters, folder / "evaluate")


def _plan(experiments: list[Experiment]) -> list[tuple[str, str]]:
    """(folder, stage) of everything to run, in order."""
    plan: dict[tuple[str, str], None] = {}
    for experiment in experiments:
        plan[data_folder(experiment), "prepare"] = None
        for stage in ("train", "trajectory", *(["evaluate"] if experiment.evaluate else [])):
            plan[experiment.name, stage] = None
    plan[REPORT, "report"] = None
    return list(plan)


class _Progress:
    """Runs the stages of a plan, says so in a line each, and keeps what failed."""

    def __init__(self, plan: list[tuple[str, str]]):
        self.plan = plan
        self.seconds: dict[tuple[str, str], float] = {}
        self.failures: dict[tuple[str, str], StageError] = {}

    def run(self, folder: str, stage: str, parameters: dict[str, Any], output_dir: Path) -> bool:
        """Run one stage of the plan; False if it failed, with the reason logged and kept."""
        key, place = (folder, stage), self._place(folder, stage)
        logger.info("%s …", place)
        begin = time.monotonic()
        try:
            run_stage(stage, parameters, output_dir)
        except StageError as error:
            self.failures[key] = error
            logger.error("%s: %s", place, error)
            return False
        self.seconds[key] = time.monotonic() - begin
        logger.info("%s: done in %.0f s (%.0f s so far)", place, self.seconds[key], sum(self.seconds.values()))
        return True

    def keep(self, folder: str, stage: str, output_dir: Path) -> None:
        """Take a stage as finished by an earlier call."""
        self.seconds[folder, stage] = 0.0
        logger.info("%s: finished earlier; delete %s to run it again", self._place(folder, stage), output_dir)

    def _place(self, folder: str, stage: str) -> str:
        return f"[{self.plan.index((folder, stage)) + 1}/{len(self.plan)}] {folder} / {stage}"

    def trained(self) -> bool:
        """Whether there is anything to report."""
        return any(stage == "train" for _, stage in self.seconds)

    def raise_for_failures(self) -> None:
        """End in one error that lists every stage that failed, and those that therefore were not run."""
        if not self.failures:
            return
        rows = []
        for folder, stage in self.plan:
            if (folder, stage) in self.failures:
                rows.append(f"  failed   {folder} / {stage}: {str(self.failures[folder, stage]).splitlines()[0]}")
            elif (folder, stage) not in self.seconds:
                rows.append(f"  not run  {folder} / {stage}")
        raise StageError("\n".join([f"{len(rows)} of {len(self.plan)} stages are missing:", *rows]))


def _check_names(experiments: list[Experiment]) -> None:
    taken = {REPORT, *(data_folder(experiment) for experiment in experiments)}
    for experiment in experiments:
        if experiment.name in taken:
            raise ConfigError(f"name: {experiment.name!r} is a folder of the run itself; name the experiment otherwise")
