"""Supervised fine-tuning on the chosen responses of prepared pairs: the model that policy and reference start from.

    python -m epsdpo.train.sft --config CONFIG --data DATA_DIR --train-dir SFT_DIR
    accelerate launch --config_file configs/accelerate/fsdp2.yaml -m epsdpo.train.sft --config CONFIG ...

The paper's Anthropic-HH experiments begin with it (section 4.1). `model.sft` and prepared data become a run of TRL's
SFTTrainer, and one that was interrupted continues.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTTrainer

from epsdpo.data.prepared import PreparedData, load_prepared
from epsdpo.experiment import ConfigError, Experiment, SftSection
from epsdpo.files import written_whole
from epsdpo.methods.loading import never_running_code
from epsdpo.methods.method_config import ON_A_CPU, has_accelerator
from epsdpo.methods.record_writer import StepRecord
from epsdpo.methods.resuming import CannotContinue, Resumable
from epsdpo.methods.sharding import saved_whole, warn_of_lost_updates
from epsdpo.models.local_models import require_local
from epsdpo.models.start import load_tokenizer, pin_revision, require_data_fit, start_of
from epsdpo.runs.decisive import of_sft
from epsdpo.runs.fingerprint import differences, key_parts
from epsdpo.runs.layout import MODEL_FOLDER
from epsdpo.train import command
from epsdpo.train.adapters import require_mergeable
from epsdpo.train.checkpoints import keep_model
from epsdpo.train.preemption import train_until_told
from epsdpo.train.processes import process_state, require_one_folder
from epsdpo.train.progress_lines import LossLines
from epsdpo.train.sft_config import SFTArguments

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"

_IGNORED = -100  # torch's label of what has no part in the loss


def finetune(
    experiment: Experiment,
    data: PreparedData,
    output_dir: str | Path,
    callbacks: Sequence[TrainerCallback] | None = None,
) -> Path:
    """Fine-tune the experiment's model into `output_dir`, or continue the run that was interrupted there.

    The folder receives the settings, a row per `logging_steps` in `steps.jsonl` (for `read_steps`), the newest
    checkpoint, and under `model/` model and tokenizer with its chat template; that folder is returned. A run that
    already finished there is not repeated.

    Args:
        data: of which the chosen responses of `train` are learnt, each once per epoch, by its ids as they are.
        callbacks: how progress is shown; default: a plain line for each `logging_steps`.

    Raises:
        ConfigError: if the experiment has no `model.sft`, its batch does not divide, the folder holds the SFT of
            other settings, or one whose record was damaged, or is not the same for all processes, or the layers of
            `model.lora` cannot be trained and merged.
        Preempted: if this process was told to end (SIGTERM, SIGUSR1), once a checkpoint is saved.
    """
    section = experiment.model.sft
    if section is None:
        raise ConfigError(f"experiment {experiment.name!r} has no section model.sft. Add one, or leave this stage out")
    output_dir = Path(output_dir)
    processes = process_state(experiment)
    require_one_folder(output_dir, processes)
    with processes.main_process_first():
        experiment = experiment.model_copy(update={"model": pin_revision(experiment.model)})
        _claim(of_sft(experiment), output_dir)
    model_dir = output_dir / MODEL_FOLDER
    if model_dir.exists():
        logger.info("fine-tuned already; delete %s to do it again", output_dir)
        return model_dir

    require_local(experiment)
    require_data_fit(experiment, data)
    require_mergeable(experiment)  # adapters are trained after this; better refused before it
    tokenizer = load_tokenizer(experiment)
    model = start_of(experiment).source
    with never_running_code(model):
        trainer = _Trainer(
            model=model,
            args=_arguments(experiment, section, output_dir, processes.num_processes),
            train_dataset=demonstrations(data, section.max_length),
            processing_class=tokenizer,
            callbacks=[LossLines()] if callbacks is None else list(callbacks),
        )
    trainer.title = f"the SFT of {experiment.name}"
    trainer.remove_callback(PrinterCallback)  # prints every log as a dictionary
    warn_of_lost_updates(trainer.model, trainer.accelerator, section.learning_rate)
    try:
        train_until_told(trainer)
    except CannotContinue as error:
        raise ConfigError(f"{experiment.name}: {error}") from error

    generation = trainer.accelerator.unwrap_model(trainer.model).generation_config
    generation.eos_token_id = _end_tokens(generation.eos_token_id, data, tokenizer)
    with saved_whole(trainer.accelerator):
        keep_model(trainer, model_dir)
    return model_dir


def demonstrations(data: PreparedData, max_length: int) -> datasets.Dataset:
    """Each training pair's prompt and chosen response as `input_ids` and `labels`, cut on the right to `max_length`.

    The ids are those that preference training will see. Labels leave the prompt out of the loss; a row of which the cut
    leaves nothing of the response is left out by TRL.
    """

    def demonstration(pair: dict[str, Any]) -> dict[str, list[int]]:
        prompt, chosen = pair["prompt_ids"], pair["chosen_ids"]
        labels = [_IGNORED] * len(prompt) + chosen
        return {"input_ids": (prompt + chosen)[:max_length], "labels": labels[:max_length]}

    return data.train.map(demonstration, remove_columns=data.train.column_names)


def _arguments(experiment: Experiment, section: SftSection, output_dir: Path, processes: int) -> SFTArguments:
    at_once = section.per_device_train_batch_size * processes
    accumulation, left_over = divmod(section.global_batch_size, at_once)
    if accumulation == 0 or left_over:
        raise ConfigError(
            f"model.sft.global_batch_size is {section.global_batch_size}, which {processes} process(es) of "
            f"per_device_train_batch_size {section.per_device_train_batch_size} cannot share evenly. Change the "
            "latter, which decides speed and memory only, or the number of processes"
        )
    on_cpu = experiment.train.get("use_cpu", False)
    if section.bf16 and not on_cpu and not has_accelerator():
        raise ConfigError(f"model.sft.bf16 is true, and this machine has no GPU. {ON_A_CPU}")
    same_name = (
        "learning_rate", "num_train_epochs", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps",
        "weight_decay", "bf16", "save_steps", "logging_steps", "seed",
    )  # fmt: skip
    return SFTArguments(
        fresh_record=experiment.train.get("fresh_record", False),
        output_dir=str(output_dir),
        gradient_accumulation_steps=accumulation,
        optim="adamw_torch",
        max_length=None,  # `demonstrations` has cut what is longer
        activation_checkpointing=section.activation_checkpointing,
        save_strategy="steps",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        model_init_kwargs={
            "trust_remote_code": False,
            "revision": start_of(experiment).revision,
            "dtype": experiment.model.dtype,
            "attn_implementation": experiment.model.attn_implementation,
        },
        **{name: getattr(section, name) for name in same_name},
    )


def _end_tokens(known: int | list[int] | None, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response of the fine-tuned model.

    A chat template may close a turn with a token of its own (Gemma's <end_of_turn>) that the base model's settings do
    not know as an end; decoding would run on behind it.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    closing = [token for token in data.train[0]["chosen_ids"] if token in special][-1:]
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id, *closing}
    return sorted(end for end in ends if end is not None)


def _claim(settings: dict[str, Any], output_dir: Path) -> None:
    """Make `output_dir` the place of these settings; refuse one that holds results of others."""
    path = output_dir / SETTINGS_FILE
    parts = key_parts(settings, {}, {})
    if path.exists():
        changes = differences(json.loads(path.read_text(encoding="utf-8")), parts)
        if changes:
            raise ConfigError(
                f"{output_dir} holds the SFT of other settings ({'; '.join(changes)}). Choose another folder, or "
                "delete this one"
            )
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(parts, indent=1, ensure_ascii=False), encoding="utf-8")


class _Trainer(Resumable, SFTTrainer):
    """TRL's, which goes on where it stopped and writes a row per log to `steps.jsonl`."""

    def __init__(self, *positional, **named):
        super().__init__(*positional, **named)
        self.record = StepRecord(self.args.output_dir, steps_per_row=self.args.logging_steps)
        self.add_callback(_LossRecord(self))


class _LossRecord(TrainerCallback):
    """Keeps the record, which charts and `epsdpo status` read, in step with the training loop."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer
        self.last_time, self.last_step = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.last_time, self.last_step = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.trainer.begin_record(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in logs:
            return  # the summary at the end of training
        now = time.monotonic()
        seconds = (now - self.last_time) / max(1, state.global_step - self.last_step)
        self.last_time, self.last_step = now, state.global_step
        row = {"step": state.global_step, "epoch": state.epoch, "loss": logs["loss"], "seconds": seconds}
        self.trainer.record.append(row)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.record.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m epsdpo.train.sft`, which returns its exit code; see `command.run`."""
    parser = argparse.ArgumentParser(prog="python -m epsdpo.train.sft", description="Fine-tune on chosen responses.")
    parser.add_argument("--config", required=True, help="YAML config of an experiment with a section model.sft")
    parser.add_argument("--data", metavar="DIR", required=True, help="its prepared data")
    parser.add_argument("--train-dir", metavar="DIR", required=True, help="where the SFT model is to be")

    def work(experiment: Experiment, options: argparse.Namespace) -> Path:
        return finetune(experiment, load_prepared(options.data), options.train_dir)

    return command.run(parser, arguments, work, "SFT model")


if __name__ == "__main__":
    sys.exit(main())
