"""Notebooks opened by hand, as in JupyterLab: where each finds what another made, and how it speaks and ends.

Headless, every folder is given. By hand, "" stands for the places here: one folder that is laid out as a batch, with
the prepared data and a folder for each experiment, so that each set of values has its own and reports can join them.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import datasets
import transformers
from IPython import get_ipython

from epsdpo.experiment import EXPERIMENT_FILE, ConfigError, Experiment, claim_folder, load_experiment, save_experiment
from epsdpo.experiment.paths import output_path, resolve_path
from epsdpo.models.start import pin_revision
from epsdpo.runs.layout import MODEL_FOLDER, experiment_of

FOLDER = Path("runs") / "notebooks"

_INTERRUPTED = "Interrupted. What was kept so far stays: run the notebook again to go on from there."


def begin() -> None:
    """Let a notebook print this package's log, without bars, which freeze in a page; interrupted, it says one line."""
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("epsdpo").setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    shell = get_ipython()
    if shell is not None:
        shell.set_custom_exc((KeyboardInterrupt,), _say_that_it_was_interrupted)


def _say_that_it_was_interrupted(
    shell: Any, kind: type, value: BaseException, trace: Any, tb_offset: Any = None
) -> list:
    shell._showtraceback(kind, value, [_INTERRUPTED])
    return [_INTERRUPTED]


def train_folder(given: str, experiment: Experiment) -> Path:
    """Where an experiment is trained: the folder that was given, else one in a folder of its own.

    Raises:
        ConfigError: if the experiment's own folder holds results of other values under its name.
    """
    if given:
        return output_path(given)
    folder = output_path(FOLDER) / experiment.name
    claim_folder(experiment, folder, pin_revision)
    return folder / "train"


def config_to_launch(config: Path, overrides: list[str], experiment: Experiment, train_dir: Path) -> Path:
    """The file that launched processes read: `config`, or with values on top of it the whole experiment as a file."""
    if not overrides:
        return config
    train_dir.mkdir(parents=True, exist_ok=True)
    path = train_dir / f"launched_{EXPERIMENT_FILE}"
    save_experiment(experiment, path)
    return path


def trained_folder(given: str) -> Path:
    """The training folder that was given, else the one that 02_train filled last.

    Raises:
        ConfigError: if there is none.
    """
    if given:
        return resolve_path(given, made_by="02_train")
    models = list(output_path(FOLDER).glob(f"*/train/{MODEL_FOLDER}"))
    if not models:
        raise ConfigError(f"{output_path(FOLDER)} holds no trained model. Run 02_train first, or give train_dir")
    return max(models, key=lambda model: model.stat().st_mtime).parent


def stage_beside(given: str, train_dir: Path, stage: str) -> Path:
    """Where a later stage of a trained experiment writes: the folder that was given, else one beside its training."""
    return output_path(given) if given else train_dir.parent / stage


def experiment_of_stage(config: str, train_dir: Path) -> Experiment:
    """The experiment of a config, or without one that which was trained in `train_dir`."""
    return load_experiment(resolve_path(config)) if config else experiment_of(train_dir)


def folder_of_runs(given: str) -> Path:
    """The folder of runs that was given, else what 02_train and 04_evaluate made by hand, else the demo.

    Raises:
        ConfigError: if there is none of them.
    """
    if given:
        return resolve_path(given)
    by_hand = output_path(FOLDER)
    return by_hand if list(by_hand.glob(f"*/train/{MODEL_FOLDER}")) else resolve_path("runs/demo", made_by="02_train")
