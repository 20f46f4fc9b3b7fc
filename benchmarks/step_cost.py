"""What one training step costs: ε-DPO here, ε-DPO and DPO on full logits, DPO by TRL and by Liger, side by side.

    python benchmarks/step_cost.py                              # on the CPU, about 12 minutes
    python benchmarks/step_cost.py --setting mini --rounds 5    # on the CPU, about 3 minutes
    python benchmarks/step_cost.py --setting smollm2_135m       # on the CPU, about 6 minutes: a head of usual size
    python benchmarks/step_cost.py --setting llama3_8b_head     # on a GPU
    python benchmarks/step_cost.py --setting llama_1b_training  # on a GPU, with AdamW

A step is forward and backward (and AdamW's update, where the setting says so) of one pair. Each contender has a process
of its own, and they take turns for `--rounds` rounds, so that a busy spell of the machine meets all of them. Memory is
the peak above what the process held with both models loaded, gradients included: resident memory on the CPU, allocated
memory on a GPU. Results go to benchmarks/results, or to `--output`, as <setting>.json, .csv and .png; the JSON keeps
the median step of each round as well, so that two contenders can be compared round by round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from contenders import CONTENDERS, OURS, OURS_ROUNDED, PEER, SETTINGS, build_models, one_pair
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from epsdpo.files import written_whole
from epsdpo.plots.looks import run_looks
from epsdpo.plots.saving import save
from epsdpo.plots.style import new_figure

RESULTS = Path(__file__).parent / "results"
# In the colours of their methods; other ways to compute one than ours, or TRL's, in shades.
_FAMILIES = {
    name: "dpo" if name.startswith("DPO") else "epsilon_dpo float32"
    for name in (OURS, PEER, *CONTENDERS, *OURS_ROUNDED)
}
COLOURS = {name: look.colour for name, look in run_looks(_FAMILIES).items()}
# Contenders of one objective must agree: a fast way to another number is not in the race.
SAME_LOSS = [
    ("DPO, TRL", "DPO, Liger's fused loss"),
    ("DPO, TRL", "DPO, full logits"),
    ("ε-DPO, full logits", "ε-DPO, epsdpo"),
]


def measure(contender: str, setting_name: str, length: int, steps: int) -> dict[str, Any]:
    """Seconds of each of `steps` steps after a first one, peak memory of them all in MiB, and the first step's loss."""
    setting = SETTINGS[setting_name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, reference = build_models(setting, device)
    row = one_pair(setting, length)
    trainer, loss_of = (CONTENDERS | OURS_ROUNDED)[contender](policy, reference, Dataset.from_list([row]), length)
    trainer.model.train()
    batch = trainer.data_collator([{**row, "pair_index": 0}])
    batch = {key: value.to(device) for key, value in batch.items()}
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6) if setting.optimizer else None

    def step() -> float:
        loss = loss_of(dict(batch))
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        trainer.model.zero_grad(set_to_none=True)
        return loss.item()  # waits for the GPU

    memory = _GPUMemory() if device.type == "cuda" else _ResidentMemory()
    first_loss, seconds = step(), []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {
        "contender": contender,
        "length": length,
        "seconds": seconds,
        "peak_mib": memory.peak_mib(),
        "models_mib": memory.before_mib(),
        "loss": first_loss,
    }


class _GPUMemory:
    """Allocated memory above that at construction."""

    def __init__(self):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def before_mib(self) -> float:
        return self.before / 2**20

    def peak_mib(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.before) / 2**20


class _ResidentMemory:
    """Resident memory of this process above that at construction, from Linux's high-water mark."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the mark
        self.before = self._kib("VmRSS")

    def _kib(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    def before_mib(self) -> float:
        return self.before / 2**10

    def peak_mib(self) -> float:
        return (self._kib("VmHWM") - self.before) / 2**10


def run_all(setting: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """What `measure` returned of each contender and length in each round, with the number of its `round`, from 1."""
    names = [name for name in CONTENDERS if "Liger" not in name or importlib.util.find_spec("liger_kernel")]
    if len(names) < len(CONTENDERS):
        print("liger-kernel is not installed, so its loss does not take part (pip install liger-kernel==0.8.5)")
    measured = []
    for length in SETTINGS[setting].lengths:
        for turn in range(rounds):
            for name in names:
                print(f"{length} tokens, round {turn + 1} of {rounds}: {name}", flush=True)
                command = [sys.executable, __file__, "--setting", setting, "--steps", str(steps)]
                done = subprocess.run(
                    [*command, "--measure", name, "--length", str(length)],
                    stdout=subprocess.PIPE,
                    text=True,
                    check=False,
                )
                if done.returncode != 0:
                    # Most often out of memory, which is a result too: the others go on.
                    print(f"  failed with exit code {done.returncode}")
                    continue
                measured.append(json.loads(done.stdout.splitlines()[-1]) | {"round": turn + 1})
    _require_agreement(measured)
    return measured


def _require_agreement(measured: list[dict[str, Any]]) -> None:
    losses = {(result["contender"], result["length"]): result["loss"] for result in measured}
    for one, other in SAME_LOSS:
        for length in {length for _, length in losses}:
            pair = [losses.get((name, length)) for name in (one, other)]
            if None not in pair and abs(pair[0] - pair[1]) > 1e-2 * abs(pair[0]):
                raise SystemExit(f"{one} and {other} disagree about the loss at {length} tokens: {pair}")


def by_round(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The median step of each contender, length and round, in seconds."""
    return [
        {key: result[key] for key in ("contender", "length", "round")}
        | {"seconds": statistics.median(result["seconds"])}
        for result in measured
    ]


def summarise(measured: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per contender and length: the median step, its range, the peak memory, and both relative to TRL's DPO."""
    rows = []
    for (length, contender), group in pd.DataFrame(measured).groupby(["length", "contender"], sort=False):
        seconds = group["seconds"].explode().astype(float)
        rows.append(
            {
                "length": length,
                "contender": contender,
                "seconds": statistics.median(seconds),
                "seconds_min": seconds.min(),
                "seconds_max": seconds.max(),
                "peak_mib": group["peak_mib"].max(),
            }
        )
    table = pd.DataFrame(rows)
    peer = table[table["contender"] == PEER].set_index("length")
    for column, ratio in (("seconds", "time_ratio"), ("peak_mib", "memory_ratio")):
        table[ratio] = table[column] / table["length"].map(peer[column])
    return table


def as_markdown(table: pd.DataFrame) -> str:
    lines = [
        "| tokens | | s per step (range) | relative | MiB above the models | relative |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        name = f"**{row.contender}**" if row.contender == OURS else row.contender
        lines.append(
            f"| {row.length:,} | {name} | {row.seconds:.3g} ({row.seconds_min:.3g}–{row.seconds_max:.3g}) "
            f"| {row.time_ratio:.2f} | {row.peak_mib:,.0f} | {row.memory_ratio:.2f} |"
        )
    return "\n".join(lines)


def draw(table: pd.DataFrame, machine: str) -> Figure:
    lengths = list(dict.fromkeys(table["length"]))
    figure, panels = new_figure(width=10.0, height=1.0 + 1.7 * len(lengths), rows=len(lengths), columns=2)
    units = ("seconds per step", 1.0), ("peak memory above the models (MiB)", 1.0)
    for row, length in enumerate(lengths):
        part = table[table["length"] == length]
        title = f"{length:,} tokens per sequence"
        draw_costs(panels[2 * row : 2 * row + 2], part, part["contender"].tolist(), title, units)
    figure.suptitle(f"One step of one pair, relative to TRL's DPO · {machine}")
    return figure


def draw_costs(
    panels: Sequence[Axes],
    table: pd.DataFrame,
    labels: Sequence[str],
    title: str,
    units: Sequence[tuple[str, float]],
) -> None:
    """Bars of time and of memory, one panel each, of the rows of `summarise`, with their ratios to TRL's DPO.

    Args:
        labels: of the rows.
        units: for time and for memory, what an axis says and how many of it a second and a MiB are.
    """
    table, places = table.iloc[::-1], range(len(table))
    costs = (("seconds", "time_ratio"), ("peak_mib", "memory_ratio"))
    for axes, (value, ratio), (unit, scale) in zip(panels, costs, units, strict=True):
        values = ends = scale * table[value]
        axes.barh(places, values, color=[COLOURS[name] for name in table["contender"]], height=0.7)
        if value == "seconds":
            ends = scale * table["seconds_max"]
            spread = [values - scale * table["seconds_min"], ends - values]
            axes.errorbar(values, places, xerr=spread, fmt="none", color="black", capsize=3)
        for place, (end, times) in enumerate(zip(ends, table[ratio], strict=True)):
            axes.annotate(f"{times:.2f}×", (end, place), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(right=1.2 * ends.max())
        axes.set_xlabel(unit)
        axes.set_yticks(places, labels[::-1] if value == "seconds" else [""] * len(labels))
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(5))


def describe_machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    packages = {}
    for name in ("torch", "transformers", "trl", "accelerate", "liger-kernel", "epsdpo"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": packages,
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes (default: 3)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in each turn, after a first one (default: 3)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.setting, options.length, options.steps)))
        return
    measured = run_all(options.setting, options.rounds, options.steps)
    table = summarise(measured)
    machine = describe_machine()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.setting}.json"
    results = {"results": table.to_dict("records"), "rounds": by_round(measured)}
    content = {"setting": options.setting, "machine": machine} | results
    with written_whole(path) as partial:  # make takes the file for the whole measurement
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    where = machine["gpu"] or f"{machine['processor']}, {machine['threads']} threads"
    caption = (
        f"Seconds and peak memory of one step of one pair, beside TRL's DPO, on {where}; the lines on the bars are "
        "the fastest and the slowest turn. The numbers at the bars are ratios to TRL's DPO."
    )
    save(draw(table, where), path.with_suffix(".png"), table, caption)
    print(as_markdown(table))


if __name__ == "__main__":
    main()
