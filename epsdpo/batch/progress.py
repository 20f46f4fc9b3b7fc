"""How far a batch is: for the runner's display, for `epsdpo status`, and for the index.

All of it is read from the files that the stages write, so that any process can ask at any time, and without torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
from epsdpo.files import read_object
from epsdpo.runs.layout import STATE_FOLDER, STEPS
from epsdpo.runs.manifest import LOG, TRAININGS, commit_of, read_manifest, read_stage_file, unreadable
from epsdpo.train.pace import as_time, seconds_left

PLAN = Path(STATE_FOLDER) / "plan.json"
NOTICES = Path(STATE_FOLDER) / "anew.txt"  # why stages were started anew that were to be forks, a line for each
PROGRESS = "progress.json"  # beside a training's record

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_LINES = 30.0
_ROWS_READ, _BYTES_READ, _WIDEST = 32, 4096, 120
_COLOURS = {"finished": "blue", "running": "bold", "failed": "red", "waiting": "dim", "interrupted": "yellow"}


@dataclass(frozen=True)
class StageStatus:
    """Where one stage of a batch stands.

    Attributes:
        name: "<folder>/<stage>".
        state: finished, running, failed, interrupted (begun, by a process that is gone) or waiting.
        seconds: that it took, or has taken so far; None if it has not begun.
        detail: step, β, loss and time left of a training; what another running stage has said last; the first line of
            what went wrong; of a result that was kept, the commits that made and kept it.
    """

    name: str
    stage: str
    folder: Path
    state: str
    seconds: float | None = None
    detail: str = ""


def batch_status(run_dir: str | Path, known: Mapping[str, StageStatus] | None = None) -> list[StageStatus]:
    """The stages that `epsdpo run` last planned in `run_dir`, in order, and where each stands now.

    Args:
        known: by name, stages that stand as they are here and are not looked at again.

    Raises:
        ConfigError: if no batch was ever run there.
    """
    path = Path(run_dir) / PLAN
    if not path.exists():
        raise ConfigError(f"{run_dir} is no run folder ({path} is missing). Give one of `epsdpo run`, e.g. runs/demo")
    try:
        stages = read_object(path)["stages"]
        entries = [
            (name, entry["stage"], Path(run_dir) / entry["folder"], entry.get("error"))
            for name, entry in stages.items()
        ]
    except (TypeError, KeyError, AttributeError):
        raise ConfigError(f"{path} cannot be read. The same `epsdpo run` writes it anew, and goes on") from None
    known = known or {}
    return [known.get(entry[0]) or _status(*entry) for entry in entries]


def _status(name: str, stage: str, folder: Path, error: str | None) -> StageStatus:
    if error is not None:
        return StageStatus(name, stage, folder, "failed", detail=_first_line(error))
    manifest, state = read_manifest(folder), read_stage_file(folder)
    if manifest is not None:
        kept = f"made by {commit_of(manifest)}" if "kept" in manifest else ""
        return StageStatus(name, stage, folder, "finished", manifest.get("seconds"), kept)
    if damaged := unreadable(folder):
        detail = f"{damaged.name} cannot be read; the same command runs it again"
        return StageStatus(name, stage, folder, "interrupted", detail=detail)
    if state is None:
        return StageStatus(name, stage, folder, "waiting")
    if state["status"] == "failed":
        return StageStatus(name, stage, folder, "failed", detail=_first_line(state.get("error", "")))
    if _is_gone(state, folder):
        return StageStatus(name, stage, folder, "interrupted", detail="the same command continues it")
    seconds = (datetime.now(UTC) - datetime.fromisoformat(state["started"])).total_seconds()
    detail = (_training_progress(folder, state) if stage in TRAININGS else "") or _last_words(folder, state)
    return StageStatus(name, stage, folder, "running", seconds, detail)


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""


def _is_gone(state: dict[str, Any], folder: Path) -> bool:
    """Whether the process of a stage that has begun has ended, or works elsewhere and this is a copy of its folder.

    Of another machine's process that is not to be known.
    """
    if state.get("inode") not in (None, folder.stat().st_ino):
        return True
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


def _training_progress(folder: Path, state: dict[str, Any]) -> str:
    """Step, β (of preference training), loss and time left, from the record; "" while its process has no step there.

    A process that continues an earlier one finds the record of that: it counts from where it says that it goes on.
    """
    progress = read_object(folder / PROGRESS)
    if progress is None or progress_mark(folder) == state.get("progress"):
        return ""
    try:
        lines = (folder / STEPS).read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines[-_ROWS_READ:] if line.endswith("\n")]
        before, total = progress.get("done_before", 0), progress["total_steps"]
        rows = [row for row in rows if row["step"] > before]
        row = rows[-1]
        seconds = seconds_left([row["seconds"] for row in rows], row["step"] - before, total - row["step"])
        beta = f"β {row['beta_after']:.4g} · " if "beta_after" in row else ""
        text = f"step {row['step']}/{total} · {beta}loss {row['loss']:.4f}"
    except (FileNotFoundError, IsADirectoryError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        return ""
    return text if seconds is None else f"{text} · {as_time(seconds)} left"


def progress_mark(folder: Path) -> list[int] | None:
    """What tells the `progress.json` of one process from that of the next one; None where there is none."""
    try:
        found = (folder / PROGRESS).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_ino, found.st_mtime_ns]


def _last_words(folder: Path, state: dict[str, Any]) -> str:
    """What the process of a running stage has said last; of a progress bar, how far it is now."""
    try:
        with (folder / LOG).open("rb") as log:
            begin = state.get("log_bytes", 0)
            log.seek(max(begin, log.seek(0, os.SEEK_END) - _BYTES_READ))
            text = log.read().decode("utf-8", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return "starting"
    lines = [line.split("\r")[-1].strip() for line in text.splitlines()]
    return next((line[:_WIDEST] for line in reversed(lines) if line), "starting")


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
        # Of hundreds of stages nearly all are finished, and are not read again every second.
        self.finished: dict[str, StageStatus] = {}
        self.states = {stage.name: stage.state for stage in batch_status(run_dir)}
        self.last_line = time.monotonic()
        self.told: set[str] = set()

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.start()
        else:
            waiting = sum(state != "finished" for state in self.states.values())
            print(f"{waiting} of {len(self.states)} stages are to be run", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        if self.live is not None:
            self.live.stop()

    def refresh(self) -> bool:
        """Look once more; whether a stage has begun or ended since the last look."""
        stages = batch_status(self.run_dir, self.finished)
        self.finished = {stage.name: stage for stage in stages if stage.state == "finished"}
        changed = [stage for stage in stages if stage.state != self.states.get(stage.name)]
        if self.live is not None:
            self.live.update(status_table(_around_the_front(stages, self.console.height - 4)), refresh=True)
        else:
            self._print_lines(stages, changed)
        self.states = {stage.name: stage.state for stage in stages}
        self._tell_notices()
        return bool(changed)

    def _tell_notices(self) -> None:
        notices = self.run_dir / NOTICES
        reasons = notices.read_text(encoding="utf-8").splitlines() if notices.exists() else []
        for reason in dict.fromkeys(reasons):
            if reason not in self.told:
                text = f"stages start anew, which takes them longer: {reason}"
                print(text, flush=True) if self.live is None else self.console.print(Text(text))
                self.told.add(reason)

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
