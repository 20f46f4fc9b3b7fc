"""Training in processes of its own: several at once through `accelerate launch`, from a notebook that shows their log.

They are started, watched and ended here, if their launch config fits the experiment; they run the commands that train.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from epsdpo.experiment import ConfigError, Experiment
from epsdpo.experiment.paths import resolve_path
from epsdpo.runs.layout import MODEL_FOLDER

if TYPE_CHECKING:
    from epsdpo.train.live import LiveChart

LOG_FILE = "train.log"

# Those that accelerate starts itself or by torchrun, which both hand standard input on; mpirun, for one, does not.
_LAUNCHED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_END = 40.0  # torchrun gives its workers 30 after SIGTERM
_LINES_OF_A_FAILURE = 12
_REPORT_OF_TORCHRUN = re.compile(r"[EW]\d{4} .*torch/distributed/elastic/\S+\] ")


class LaunchError(RuntimeError):
    """A launched training that failed. The message has its exit code, its last lines and the place of its log."""


def launcher_command(launch_config: str, num_processes: int, experiment: Experiment) -> list[str]:
    """The command that starts training processes for `experiment`; empty to train in the process that asks.

    Args:
        launch_config: an accelerate config file, from the working directory or the repository; "" for none.
        num_processes: how many to start; 0 for as many as the file says.

    Raises:
        ConfigError: naming file, key and remedy, if the file cannot launch this experiment from one notebook.
    """
    if num_processes < 0:
        raise ConfigError(f"num_processes is {num_processes}; give 0 for as many as the launch config says, or more")
    if not launch_config:
        if num_processes:
            raise ConfigError(
                f"num_processes is {num_processes}, but there is no launch config to start them by. "
                "Name one, e.g. configs/accelerate/multi_gpu.yaml"
            )
        return []
    path = resolve_path(launch_config)
    launch = _read(path)
    problems = _problems(launch, num_processes or launch.num_processes, experiment)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*command, "--num_processes", str(num_processes)] if num_processes else command


def launch_training(
    launcher: list[str],
    config: str | Path,
    data_dir: str | Path,
    train_dir: str | Path,
    chart: LiveChart | None = None,
    sft_dir: str | Path = "",
) -> Path:
    """Train in processes started by `launcher`, and return the folder of the trained model.

    Their output is printed as it comes, and added to `train.log` in `train_dir`. They end with the caller: at once when
    it is interrupted, terminated or killed; the same call then takes training up from its last checkpoint.

    Args:
        config: of the experiment.
        data_dir: its prepared data.
        train_dir: what `train` calls `output_dir`.
        chart: to be kept up to date besides.
        sft_dir: what `launch_sft` filled, for an experiment with `model.sft`.

    Raises:
        LaunchError: if training fails.
    """
    arguments = ["--sft-dir", str(sft_dir)] if sft_dir else []
    return _launch(launcher, "epsdpo.train", config, data_dir, train_dir, arguments, chart)


def launch_sft(
    launcher: list[str],
    config: str | Path,
    data_dir: str | Path,
    sft_dir: str | Path,
    chart: LiveChart | None = None,
) -> Path:
    """Fine-tune as `launch_training` trains: `epsdpo.train.sft` in processes of its own, which end with the caller."""
    return _launch(launcher, "epsdpo.train.sft", config, data_dir, sft_dir, [], chart)


def _launch(
    launcher: list[str],
    module: str,
    config: str | Path,
    data_dir: str | Path,
    train_dir: str | Path,
    arguments: list[str],
    chart: LiveChart | None,
) -> Path:
    train_dir = Path(train_dir)
    train_dir.mkdir(parents=True, exist_ok=True)
    command = [*launcher, "-m", module, "--config", str(config), "--data", str(data_dir)]
    command += ["--train-dir", str(train_dir), *arguments, "--end-with-stdin"]
    with (train_dir / LOG_FILE).open("a+b") as log:
        log.write(f"\n=== {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC · {shlex.join(command)}\n".encode())
        start = log.tell()
        process = subprocess.Popen(
            command,
            # Nothing is ever written to it. The training processes inherit its other end, and end when this one
            # closes, which it does however this process ends; signals to the launcher would not reach workers that
            # torchrun has put into sessions of their own.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},  # a bar would fill the page, frame after frame
            start_new_session=True,  # an interrupt of the notebook comes by way of this process, and once
        )
        try:
            _pass_on_output(process, log, chart)
            code = process.wait()
        finally:
            _end(process)
        if code:
            log.seek(start)
            last_lines = _failure(log.read().decode("utf-8", errors="replace"))
            raise LaunchError(f"training ended with exit code {code}:\n{last_lines}\nwhole log: {train_dir / LOG_FILE}")
    if chart is not None:
        chart.finish()
    return train_dir / MODEL_FOLDER


def _read(path: Path) -> ClusterConfig:
    try:
        launch = load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: accelerate cannot read it as a launch config ({error}). Start from a file of configs/accelerate"
        ) from error
    if not isinstance(launch, ClusterConfig):
        raise ConfigError(
            f"{path}: compute_environment is {launch.compute_environment.value!r}; only LOCAL_MACHINE can be launched "
            "from a notebook"
        )
    return launch


def _problems(launch: ClusterConfig, num_processes: int, experiment: Experiment) -> list[str]:
    """Why `launch` cannot start `num_processes` processes for `experiment`, with remedies."""
    problems = []
    if launch.num_machines > 1:
        problems.append(
            f"num_machines is {launch.num_machines}, but a notebook starts processes on its own machine only. Use a "
            "file for one machine, or start `accelerate launch -m epsdpo.train` on each"
        )
    if num_processes < 1:
        problems.append("num_processes is missing. Add it, or give a number of processes with the run")
    if launch.distributed_type not in _LAUNCHED:
        problems.append(
            f"distributed_type is {launch.distributed_type.value}; use {', '.join(kind.value for kind in _LAUNCHED)}, "
            "for several processes on the CPU MULTI_GPU with use_cpu, as configs/accelerate/cpu.yaml does"
        )
    if launch.distributed_type == DistributedType.NO and num_processes > 1:
        problems.append(
            f"distributed_type is NO, which starts one process, not {num_processes}. Use a file such as "
            "configs/accelerate/multi_gpu.yaml"
        )
    on_cpu = experiment.train.get("use_cpu", False)
    if launch.use_cpu and not on_cpu:
        problems.append(
            f"use_cpu is true, but experiment {experiment.name!r} does not say train.use_cpu: true. Add that to the "
            "experiment, or use a launch config for GPUs"
        )
    if on_cpu and not launch.use_cpu:
        problems.append(
            f"use_cpu is false, but experiment {experiment.name!r} says train.use_cpu: true. Remove that from the "
            "experiment, or use configs/accelerate/cpu.yaml"
        )
    if launch.mixed_precision not in (None, "no"):
        problems.append(
            f"mixed_precision is {launch.mixed_precision!r}, which would override the experiment's own precision. Set "
            "it to 'no', and train.bf16 or train.fp16 in the experiment"
        )
    return problems


def _pass_on_output(process: subprocess.Popen, log: BinaryIO, chart: LiveChart | None) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        readable, _, _ = select.select([process.stdout], [], [], _SECONDS_BETWEEN_LOOKS)
        if readable:
            output = os.read(process.stdout.fileno(), 2**16)
            if not output:
                return
            log.write(output)
            log.flush()
            print(decoder.decode(output), end="", flush=True)
        elif process.poll() is not None:
            return  # a background process that outlived training, e.g. of a tracker, keeps the pipe open
        if chart is not None:
            chart.refresh()


def _end(process: subprocess.Popen) -> None:
    """End the launcher and the training processes, those that have not ended by themselves."""
    process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    process.stdout.close()


def _failure(log: str) -> str:
    """The last lines of the workers, and the line in which torchrun says how the first of them ended.

    What follows that line is a traceback through the launcher and a table without the error.
    """
    lines = log.splitlines()
    reports = [number for number, line in enumerate(lines) if _REPORT_OF_TORCHRUN.match(line)]
    return "\n".join(lines[: reports[-1] + 1 if reports else None][-_LINES_OF_A_FAILURE:])
