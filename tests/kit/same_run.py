"""Small runs of one config, as a batch leaves them: repeats of it, and what goes wrong in it one at a time.

    python -m kit.same_run BATCH THREADS...

trains one for each number of threads, into folders named by it, with the data in BATCH and the processor's features
that the environment asks for.
"""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer

from epsdpo.data.prepared import load_prepared, prepare
from epsdpo.evaluation.evaluate import evaluate
from epsdpo.experiment import Experiment, check_experiment, save_experiment
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.experiment.values import merged
from epsdpo.runs.manifest import write_manifest
from epsdpo.train.preferences import train
from kit.official import OFFICIAL

DATA = "data-1"
# Ten steps: two epochs of four windows of twenty pairs and one of sixteen. The rate is 0 in the first and full in the
# third, so that policy and reference part in the third, whose pairs are the first to decide.
SETTINGS = {
    "name": "eps",
    "method": "epsilon_dpo",
    "data": {"source": str(OFFICIAL / "pairs.jsonl")},
    "model": {"name_or_path": "model", "dtype": "float32"},
    "train": {
        "beta": 0.1,
        "epsilon": 0.05,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "num_train_epochs": 2,
        "global_batch_size": 20,
        "per_device_train_batch_size": 20,
        "max_length": 128,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": True,
    },
    "evaluate": {"prompts": {"column": "prompt"}, "judge": None, "max_new_tokens": 12, "bootstrap_samples": 20},
}


def settings(batch: Path, **changes: dict) -> dict:
    """The config of a run in a batch, with changes by section."""
    places = {
        "model": {"name_or_path": str(batch / "model")},
        "evaluate": {"prompts": {"source": str(batch / "prompts.jsonl")}},
    }
    return merged(merged(SETTINGS, places), changes)


def begin(batch: Path) -> Path:
    """A batch with model, prompts and data."""
    (batch / "model").mkdir(parents=True)
    for source in (*(OFFICIAL / "policy").iterdir(), *(OFFICIAL / "tok").iterdir()):
        (batch / "model" / source.name).write_bytes(source.read_bytes())
    rows = [{"prompt": f"tell me about {words}"} for words in ("the soup", "the clock", "a robot", "my friend") * 6]
    rows = [{"prompt": row["prompt"] + ":" * (1 + place)} for place, row in enumerate(rows)]
    (batch / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare_data(batch)
    return batch


def prepare_data(batch: Path, change: Callable[[dict], dict] = lambda row: row, **changes: dict) -> Path:
    """The data of a config; `change` is done to each of its prepared rows."""
    experiment = check_experiment(settings(batch, **changes), where="test")
    tokenizer = AutoTokenizer.from_pretrained(experiment.model.name_or_path)
    folder = batch / DATA
    prepare(experiment.data, tokenizer, folder, max_length=experiment.train["max_length"])
    table = pq.read_table(folder / "train.parquet")
    rows = [change(row) for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "train.parquet")
    return folder


def train_run(batch: Path, name: str, /, evaluated: bool = False, **changes: dict) -> Path:
    """A run of the batch's data, with what its stages leave beside it."""
    experiment = check_experiment(settings(batch, **changes), where="test")
    folder, data_dir = batch / name, batch / DATA
    train(experiment, load_prepared(data_dir), folder / "train", callbacks=[])
    finish(experiment, folder, data_dir)
    if evaluated:
        evaluate(experiment, data_dir, folder / "train", folder / "evaluate")
    return folder


def finish(experiment: Experiment, folder: Path, data_dir: Path) -> None:
    """What the runner leaves of a training beside it."""
    save_experiment(experiment, folder / "experiment.yaml")
    parameters = {"config": str(folder / "experiment.yaml"), "data_dir": str(data_dir)}
    write_manifest(
        folder / "train",
        stage="train",
        parameters=parameters,
        facts={},
        parts={},
        inputs=[],
        started=datetime.now(UTC),
        repository=REPOSITORY,
    )


if __name__ == "__main__":
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        train_run(Path(sys.argv[1]), str(threads), evaluated=threads == 1)
