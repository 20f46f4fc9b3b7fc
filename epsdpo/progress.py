"""How far a batch is, read from its folder: for the runner's display, for `epsdpo status`, and for the index.

It needs nothing but the files that the stages write, so any process can ask at any time. It never imports torch.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from epsdpo.experiment import ConfigError
from epsdpo.manifest import read_manifest, read_stage_file
from epsdpo.record import DamagedRecord, first_and_last_row, read_total_steps

PLAN = Path(".epsdpo") / "plan.json"

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_COLOURS = {"finished": "blue", "running": "bold", "failed": "red", "waiting": "dim", "interrupted": "yellow"}


@dataclass(frozen=True)
class StageStatus:
    """Where one stage of a batch stands.

    Attributes:
        name: "<folder>/<stage>".
        state: finished, running, failed, interrupted (begun, by a process that is gone) or waiting.
        seconds: that it took, or has taken so far; None if it has not begun.
        detail: step, β, loss and time left of a training; the first line of what went wrong.
    """

    name: str
    stage: str
    folder: Path
    state: str
    seconds: float | None = None
    detail: str = ""


def batch_status(run_dir: str | Path) -> list[StageStatus]:
    """The stages that `epsdpo run` last planned in `run_dir`, in order, and where each stands now.

    Raises:
        ConfigError: if no batch was ever run there.
    """
    path = Path(run_dir) / PLAN
    if not path.exists():
        raise ConfigError(f"{run_dir} is no run folder ({path} is missing). Give one of `epsdpo run`, e.g. runs/demo")
    plan = json.loads(path.read_text(encoding="utf-8"))
    return [_status(name, **entry) for name, entry in plan["stages"].items()]


def _status(name: str, stage: str, folder: str, error: str | None = None) -> StageStatus:
    folder = Path(folder)
    if error is not None:
        return StageStatus(name, stage, folder, "failed", detail=_first_line(error))
    manifest, state = read_manifest(folder), read_stage_file(folder)
    if manifest is not None:
        return StageStatus(name, stage, folder, "finished", manifest["seconds"])
    if state is None:
        return StageStatus(name, stage, folder, "waiting")
    seconds = (datetime.now(UTC) - datetime.fromisoformat(state["started"])).total_seconds()
    if state["status"] == "failed":
        return StageStatus(name, stage, folder, "failed", detail=_first_line(state["error"]))
    if _is_gone(state):
        return StageStatus(name, stage, folder, "interrupted", detail="the same command continues it")
    return StageStatus(
        name, stage, folder, "running", seconds, _training_progress(folder) if stage in ("sft", "train") else ""
    )


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _is_gone(state: dict[str, Any]) -> bool:
    """Whether the process of a stage that has begun has ended; not to be known of another machine's."""
    if state["host"] != platform.node():
        return False
    try:
        process = psutil.Process(state["pid"])
        reused = process.create_time() > datetime.fromisoformat(state["started"]).timestamp() + 1
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _training_progress(folder: Path) -> str:
    """Step, β (of preference training), loss and time left, from the last whole line of the record."""
    try:
        _, row = first_and_last_row(folder)
        total = read_total_steps(folder)
        left = row["seconds"] * (total - row["step"])
        beta = f"β {row['beta_after']:.4g} · " if "beta_after" in row else ""
        return f"step {row['step']}/{total} · {beta}loss {row['loss']:.4f} · {as_time(left)} left"
    except (KeyError, TypeError, DamagedRecord):
        return "starting"


def as_time(seconds: float) -> str:
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def status_table(stages: list[StageStatus]) -> Table:
    """For a terminal: a row per stage, with what runs and what failed in words."""
    done = sum(stage.state == "finished" for stage in stages)
    table = Table(title=f"{done} of {len(stages)} stages finished", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "state", "time", ""):
        table.add_column(column, no_wrap=column != "", justify="right" if column == "time" else "left")
    for stage in stages:
        seconds = "" if stage.seconds is None else as_time(stage.seconds)
        # As Text: names and errors are not rich's markup.
        table.add_row(Text(stage.name), Text(stage.state, style=_COLOURS[stage.state]), seconds, Text(stage.detail))
    return table


class Display:
    """Shows a batch as it runs: a table that moves in a terminal, or a line for each change in a log."""

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.console = Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.states = {stage.name: stage.state for stage in batch_status(run_dir)}
        self.last_line = time.monotonic()

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self.live is not None:
            self.live.stop()

    def refresh(self) -> bool:
        """Look once more; whether a stage has begun or ended since the last look."""
        stages = batch_status(self.run_dir)
        changed = [stage for stage in stages if stage.state != self.states.get(stage.name)]
        if self.live is not None:
            self.live.update(status_table(_around_the_front(stages, self.console.height - 4)), refresh=True)
        else:
            self._print_lines(stages, changed)
        self.states = {stage.name: stage.state for stage in stages}
        return bool(changed)

    def _print_lines(self, stages: list[StageStatus], changed: list[StageStatus]) -> None:
        due = changed
        if time.monotonic() - self.last_line >= _SECONDS_BETWEEN_LINES:
            due = [stage for stage in stages if stage in changed or stage.state == "running"]
        if not due:
            return
        self.last_line = time.monotonic()
        finished = sum(stage.state == "finished" for stage in stages)
        for stage in due:
            time_taken = "" if stage.seconds is None else f" · {as_time(stage.seconds)}"
            detail = f" · {stage.detail}" if stage.detail else ""
            print(f"[{finished}/{len(stages)}] {stage.name}: {stage.state}{time_taken}{detail}", flush=True)


def _around_the_front(stages: list[StageStatus], rows: int) -> list[StageStatus]:
    """What fits on the screen: failures and what runs first of all, then what waits, then what was finished last."""
    if len(stages) <= rows:
        return stages
    rank = {"running": 0, "failed": 1, "interrupted": 1, "waiting": 2, "finished": 3}
    kept = sorted(range(len(stages)), key=lambda place: (rank[stages[place].state], place))[: max(rows, 1)]
    return [stages[place] for place in sorted(kept)]


def follow(process: subprocess.Popen, display: Display, on_change: Callable[[], None]) -> None:
    """Show a batch until the process that runs it ends; `on_change` is called now and then if stages began or ended."""
    told, changed = time.monotonic(), True
    while process.poll() is None:
        changed = display.refresh() or changed
        if changed and time.monotonic() - told >= _SECONDS_BETWEEN_LINES:
            on_change()
            told, changed = time.monotonic(), False
        try:
            process.wait(_SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            continue


def print_status(run_dir: str | Path) -> int:
    """Print where a batch stands; 1 if something failed or was interrupted, else 0."""
    stages = batch_status(run_dir)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(status_table(stages))
    return int(any(stage.state in ("failed", "interrupted") for stage in stages))
