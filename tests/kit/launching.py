"""How tests start runs in several processes, and what it means that two runs are the same."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from epsdpo.methods.checkpoint_files import FILES_LIST
from epsdpo.methods.record import read_pairs, read_steps
from epsdpo.train import preferences as train
from kit.distributed_worker import SETTINGS, TRAIN_PAIRS
from kit.official import OFFICIAL, save_official_model

REPOSITORY = Path(__file__).parents[2]
WORKER = "tests/kit/distributed_worker.py"
ON_CPU = "tests/kit/sharded_on_cpu.py"
LOG_2 = torch.tensor(2.0).log().item()  # as float32 has it


def launcher(config: str | Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *options]


def on_cpu(name: str, folder: Path, **changes) -> Path:
    """A file of configs/accelerate as it is committed, but for two processes on the CPU and other `changes`."""
    values = yaml.safe_load((REPOSITORY / "configs" / "accelerate" / name).read_text(encoding="utf-8"))
    path = folder / name
    path.write_text(yaml.safe_dump({**values, "num_processes": 2, **changes}), encoding="utf-8")
    return path


def experiment(folder: Path) -> Path:
    """The config of a run of `epsdpo.train` on the worker's data and settings, with checkpoints at steps 3, 6, 9."""
    model = save_official_model(folder / "start")
    settings = {key: value for key, value in SETTINGS.items() if key != "disable_tqdm"}
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(OFFICIAL / "pairs.jsonl"), "max_train_pairs": len(TRAIN_PAIRS)},
        "model": {"name_or_path": str(model)},
        "train": {**settings, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(*command: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)),
        cwd=REPOSITORY,
        # One thread each, as the one process has, so that sums are taken in the same order.
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train_here(config: Path, output: Path) -> None:
    """`python -m epsdpo.train` in this one process."""
    assert train.main(["--config", str(config), "--output", str(output)]) == 0


def run(*command: str | Path, **environment: str) -> str:
    """What the command printed; it must succeed."""
    process = start(*command, **environment)
    try:
        log, _ = process.communicate(timeout=280)
    finally:
        kill(process)
    assert process.returncode == 0, log[-6000:]
    return log


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for the launcher and all processes that it started, if they still run."""
    if process.poll() is None:
        # The processes that train have a session of their own, so a signal to the launcher's group misses them.
        for training in psutil.Process(process.pid).children(recursive=True):
            training.kill()
        process.kill()
        process.communicate()


def kill_after_checkpoint(process: subprocess.Popen, checkpoint: Path) -> None:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (checkpoint / FILES_LIST).exists():
        time.sleep(0.01)
    assert process.poll() is None, f"the run ended before it could be killed:\n{process.communicate()[0][-6000:]}"
    kill(process)


def assert_same_run(one: Path, other: Path, per_epoch: int, atol: float = 1e-5, beta_rtol: float = 0.0) -> None:
    """Same pairs, decisions, β and losses at every step, each pair once in an epoch, and the same trained weights.

    Args:
        per_epoch: pairs in one epoch.
        atol: how far losses (nats) and weights may be apart, as the order of their sums is another.
        beta_rtol: how far β may be apart, relative to it; 0 where it follows from counts.
    """
    steps, other_steps = read_steps(one), read_steps(other)
    assert other_steps["step"].tolist() == list(range(1, len(steps) + 1))
    for column in ("relaxed", "tied", "tightened", "pairs_seen"):
        assert other_steps[column].tolist() == steps[column].tolist(), column
    for column in ("beta_before", "beta_after"):
        np.testing.assert_allclose(other_steps[column], steps[column], rtol=beta_rtol, atol=0.0)
    np.testing.assert_allclose(other_steps["loss"], steps["loss"], rtol=0.0, atol=atol)

    order = ["step", "pair_id"]
    pairs, other_pairs = (read_pairs(run).sort_values(order, ignore_index=True) for run in (one, other))
    assert other_pairs[[*order, "decision"]].equals(pairs[[*order, "decision"]])
    epochs = other_pairs.groupby(np.ceil(other_pairs["epoch"] - 1e-9))["pair_id"]
    assert epochs.size().tolist() == epochs.nunique().tolist() == [per_epoch] * len(epochs)

    weights, other_weights = (trained_weights(run) for run in (one, other))
    assert set(other_weights) == set(weights)
    for name, value in weights.items():
        apart = (other_weights[name] - value).abs().max()
        assert apart <= atol, f"{name} is {apart:.1e} apart"


def assert_same_log(one: Path, other: Path) -> None:
    """All that was logged in training and evaluation, but for times."""
    logs, other_logs = (read_json(run / "log.json") for run in (one, other))
    assert len(other_logs) == len(logs)
    for log, other_log in zip(logs, other_logs, strict=True):
        timed = {key for key in log if key.endswith(("_runtime", "_per_second")) or key in ("total_flos", "epoch")}
        assert {key: other_log[key] for key in log.keys() - timed} == pytest.approx(
            {key: log[key] for key in log.keys() - timed}, rel=1e-3, abs=1e-5
        )


def assert_nothing_tells_apart(run: Path, evaluations: list[dict[str, float]]) -> None:
    """That a policy equal to its reference had margins of exactly 0, losses of log 2 and ties, also where evaluated."""
    pairs = read_pairs(run)
    assert (pairs["decision"] == 0).all()
    assert (pairs[["log_ratio_margin", "reward_margin"]] == 0.0).all(axis=None)
    assert read_steps(run)["loss"].tolist() == [LOG_2] * pairs["step"].nunique()
    assert evaluations
    for log in evaluations:
        assert log["eval_loss"] == LOG_2
        for name in ("rewards/margins", "rewards/chosen", "kl/p_epsilon_steps", "kl/n_epsilon_steps"):
            assert log[f"eval_{name}"] == 0.0, name


def evaluations_of(run: Path) -> list[dict[str, float]]:
    """What a run of the worker evaluated before training, where it did, and within."""
    logs = [log for path in sorted(run.glob("*.json")) if path.stem in ("before", "log") for log in read_json(path)]
    return [log for log in logs if "eval_loss" in log]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def trained_weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "model").glob("*.safetensors")
    return load_file(file)
