"""One training of somebody's trainer on the vectors, and what can be seen of it from outside."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from epsdpo.paper.conformance.subject import Subject
from epsdpo.paper.conformance.vectors import model_of, tokenizer_of

Weights = dict[str, torch.Tensor]


@dataclass
class Run:
    """What was seen: at `step` (from 1) the logged loss, and before it β and the weights; those after the last too.

    β is absent where the trainer has no attribute of that name.
    """

    loss: dict[int, float] = field(default_factory=dict)
    beta: dict[int, float] = field(default_factory=dict)
    weights: dict[int, Weights] = field(default_factory=dict)
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Setting:
    """How a training differs from the plainest: no step of the weights but with a learning rate, pairs in order."""

    pairs: Sequence[int]
    batch: int
    accumulation: int = 1
    epochs: int = 1
    learning_rate: float = 0.0
    policy: str = "policy"
    dtype: torch.dtype = torch.float32
    evaluated: Sequence[int] = ()
    stop_after: int | None = None
    resume_from: Path | None = None
    args: dict[str, Any] = field(default_factory=dict)


def train(subject: Subject, vectors: dict[str, Any], setting: Setting, folder: Path) -> Run:
    """A whole training in `folder`, of whose output nothing is shown. What the trainer raises is not caught."""
    watch = _Watch(subject, setting.stop_after)
    texts = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in vectors["pairs"]]
    data = [Dataset.from_list([texts[number] for number in numbers]) for numbers in (setting.pairs, setting.evaluated)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        trainer = subject.trainer(
            model=model_of(vectors, setting.policy, setting.dtype),
            ref_model=model_of(vectors, "reference", setting.dtype),
            args=_arguments(subject, vectors, setting, folder),
            train_dataset=data[0],
            eval_dataset=data[1] if setting.evaluated else None,
            processing_class=tokenizer_of(vectors),
            callbacks=[watch],
        )
        watch.trainer = trainer
        trainer.train(resume_from_checkpoint=setting.resume_from and str(setting.resume_from))
    watch.look(trainer.state.global_step + 1)
    watch.run.loss = {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}
    if not watch.run.loss:
        raise ValueError("state.log_history has no `loss`, with logging_steps=1")
    watch.run.checkpoint = max(folder.glob("checkpoint-*"), default=None)
    return watch.run


def _arguments(subject: Subject, vectors: dict[str, Any], setting: Setting, folder: Path) -> Any:
    given = vectors["arguments"]
    return subject.args_class(
        **{
            "output_dir": str(folder),
            "beta": given["beta"],
            subject.epsilon: given["epsilon"],
            "learning_rate": setting.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": setting.batch,
            "per_device_eval_batch_size": setting.batch,
            "gradient_accumulation_steps": setting.accumulation,
            "num_train_epochs": setting.epochs,
            "train_sampling_strategy": "sequential",
            "eval_strategy": "steps" if setting.evaluated else "no",
            "eval_steps": 1 if setting.evaluated else None,
            "save_strategy": "steps" if setting.stop_after else "no",
            "save_steps": setting.stop_after or 500,
            "logging_steps": 1,
            "bf16": False,
            "activation_checkpointing": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **subject.args,
            **setting.args,
        }
    )


class _Watch(TrainerCallback):
    """Looks at trainer and weights before each step, and ends the training after the step it is told."""

    trainer: Any

    def __init__(self, subject: Subject, stop_after: int | None):
        self.subject, self.stop_after, self.run = subject, stop_after, Run()

    def look(self, step: int) -> None:
        beta = self.subject.beta_of(self.trainer)
        if beta is not None:
            self.run.beta[step] = beta
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self.run.weights[step] = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    def on_step_begin(self, args, state, control, **kwargs):
        self.look(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.stop_after


def save_run(run: Run, path: Path) -> None:
    """Losses and β of a run as JSON."""
    path.write_text(json.dumps({"loss": run.loss, "beta": run.beta}), encoding="utf-8")


def read_run(path: Path) -> Run:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Run(**{name: {int(step): value for step, value in found.items()} for name, found in values.items()})
