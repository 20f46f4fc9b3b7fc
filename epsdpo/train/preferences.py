"""Train one experiment: the entry point of the notebook, of the command and of `accelerate launch`.

    python -m epsdpo.train --config configs/demo/epsilon_dpo_fp32.yaml
    accelerate launch --config_file configs/accelerate/zero3.yaml \\
        -m epsdpo.train --config configs/paper/table1_llama3/epsilon_dpo.yaml

An experiment becomes a trainer, on data that are prepared, and a run that was interrupted continues.
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PrinterCallback, Trainer, TrainerCallback

from epsdpo.data.prepared import REPORT, PreparedData, load_prepared, prepare
from epsdpo.experiment import ConfigError, Experiment, claim_folder
from epsdpo.experiment.validate import no_held_out_pairs
from epsdpo.methods.catalogue import config_class, trainer_class
from epsdpo.methods.loading import never_running_code, read_config
from epsdpo.methods.method_config import MethodConfig
from epsdpo.methods.resuming import CannotContinue
from epsdpo.models.local_models import require_local
from epsdpo.models.start import after_sft, load_tokenizer, pin_revision, require_data_fit, start_of
from epsdpo.runs.layout import MODEL_FOLDER
from epsdpo.train import command
from epsdpo.train.adapters import lora_config, merge_adapter, require_mergeable
from epsdpo.train.checkpoints import keep_model
from epsdpo.train.memory import MemoryOutlook, OutOfMemory, is_out_of_memory
from epsdpo.train.preemption import train_until_told
from epsdpo.train.processes import process_state, require_one_folder
from epsdpo.train.progress_lines import ProgressLines

logger = logging.getLogger(__name__)


def train(
    experiment: Experiment,
    data: PreparedData,
    output_dir: str | Path,
    callbacks: Sequence[TrainerCallback] | None = None,
    sft_dir: str | Path = "",
) -> Path:
    """Train `experiment` on `data` into `output_dir`, or continue the run that was interrupted there.

    The folder receives the resolved config, the β record, checkpoints, and under `model/`
    the trained model and tokenizer; that folder is returned. With `model.lora` the adapter is under `adapter/`, and
    merged into the model under `model/`. A run that already finished there is not repeated.

    Args:
        callbacks: how progress is shown; default: a plain line for each `logging_steps`.
        sft_dir: what `epsdpo.train.sft` wrote, for an experiment with `model.sft`.

    Raises:
        ConfigError: if the folder holds a run of another config, or one whose record was damaged, or is not the same
            for all processes, `sft_dir` is not what the experiment needs, or the layers of `model.lora` cannot be
            trained and merged.
        OutOfMemory: if an allocation fails, with settings that need less.
        Preempted: if this process was told to end (SIGTERM, SIGUSR1), once a checkpoint is saved.
    """
    output_dir = Path(output_dir)
    processes = process_state(experiment)
    require_one_folder(output_dir, processes)
    with processes.main_process_first():
        experiment = claim_folder(experiment, output_dir, pin_revision)
    model_dir = output_dir / MODEL_FOLDER
    if model_dir.exists():
        logger.info("%s is trained already; delete %s to train it again", experiment.name, output_dir)
        return model_dir

    experiment = after_sft(experiment, sft_dir)
    require_local(experiment)
    require_mergeable(experiment)
    require_data_fit(experiment, data)
    arguments = trainer_arguments(experiment, data, output_dir)
    outlook = memory_outlook(experiment, arguments, data)
    if processes.is_main_process:
        logger.info(outlook.table())
        if not outlook.fits:
            logger.warning(outlook.warning())
    trainer = None
    try:
        trainer = build_trainer(experiment, data, arguments, [ProgressLines()] if callbacks is None else callbacks)
        train_until_told(trainer)
    except CannotContinue as error:
        raise ConfigError(f"{experiment.name}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(outlook.failure(error, _moment(trainer))) from error

    merge = None if experiment.model.lora is None else partial(merge_adapter, experiment)
    keep_model(trainer, model_dir, merge)
    return model_dir


def trainer_arguments(experiment: Experiment, data: PreparedData, output_dir: str | Path) -> MethodConfig:
    """The trainer's arguments for an experiment.

    Raises:
        ConfigError: if it is to evaluate on held-out pairs that the data do not have, or the machine or the number of
            processes does not permit them.
    """
    try:
        arguments = config_class(experiment.method)(
            output_dir=str(output_dir),
            disable_tqdm=True,
            model_init_kwargs={
                "trust_remote_code": False,
                "revision": start_of(experiment).revision,
                "dtype": experiment.model.dtype,
                "attn_implementation": experiment.model.attn_implementation,
            },
            **experiment.training_arguments(),
        )
    except ValueError as error:
        raise ConfigError(f"train.{error}") from error
    if (arguments.do_eval or arguments.eval_on_start) and data.eval is None:
        raise ConfigError(no_held_out_pairs(arguments)[1])
    return arguments


def memory_outlook(experiment: Experiment, arguments: MethodConfig, data: PreparedData) -> MemoryOutlook:
    """How much memory each process of the run will need, beside what there is; reads the model's config only."""
    source, revision = start_of(experiment)
    config = read_config(source, revision)
    return MemoryOutlook.of_run(config, arguments, data.train, lora_config(experiment.model.lora))


def build_trainer(
    experiment: Experiment, data: PreparedData, arguments: MethodConfig, callbacks: Sequence[TrainerCallback]
) -> Trainer:
    """The trainer of an experiment, ready for `train()`; the reference, if any, is a copy of the starting model."""
    model = start_of(experiment).source
    tokenizer = load_tokenizer(experiment)
    with never_running_code(model):
        trainer = trainer_class(experiment.method)(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.eval if arguments.do_eval else None,
            processing_class=tokenizer,
            callbacks=list(callbacks),
            peft_config=lora_config(experiment.model.lora),
        )
    trainer.title = experiment.name
    trainer.remove_callback(PrinterCallback)  # prints every log as a dictionary of thirty numbers
    return trainer


def _moment(trainer: Trainer | None) -> str:
    if trainer is None:
        return "while the models were loaded"
    return f"in optimiser step {trainer.state.global_step + 1} of {trainer.state.max_steps}"


def _prepared_and_trained(experiment: Experiment, options: argparse.Namespace) -> Path:
    require_local(experiment)
    run_dir = Path(options.output or Path("runs") / experiment.name)
    data_dir = Path(options.data or run_dir / "data")
    processes = process_state(experiment)
    if not options.data:
        require_one_folder(data_dir, processes)
    with processes.main_process_first():
        if not options.data and not (data_dir / REPORT).exists():
            tokenizer = load_tokenizer(experiment)
            prepare(experiment.data, tokenizer, data_dir, max_length=experiment.train["max_length"])
        data = load_prepared(data_dir)
    return train(experiment, data, options.train_dir or run_dir / "train", sft_dir=options.sft_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m epsdpo.train`, which returns its exit code; see `command.run`."""
    parser = argparse.ArgumentParser(
        prog="python -m epsdpo.train", description="Prepare data and train one experiment."
    )
    parser.add_argument("--config", required=True, help="YAML config of one experiment")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/<name of the experiment>)")
    parser.add_argument("--data", metavar="DIR", help="prepared data (default: made in <run folder>/data)")
    parser.add_argument(
        "--sft-dir", metavar="DIR", default="", help="what epsdpo.train.sft wrote, for a config with model.sft"
    )
    parser.add_argument("--train-dir", metavar="DIR", help="training's own folder (default: <run folder>/train)")
    return command.run(parser, arguments, _prepared_and_trained, "Trained model")
