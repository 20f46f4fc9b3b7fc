"""What a step of ε-DPO should cost on a GPU, from shapes and rates alone, for a measurement to contradict.

    python benchmarks/expected.py   # prints the tables of "What to expect" in benchmarks/README.md

Rates are those of an H200. A product of (n, h) and (h, v) has 2nhv operations. A step has five of them at the head:
policy and reference forward, the policy recomputed, and one for each of two gradients. In a layer it has four for each
weight: policy and reference forward, and two gradients.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from contenders import OURS, PEER, PROMPT_TOKENS, SETTINGS, Setting

from epsdpo.methods.kernels import TOKENS_PER_TILE, VOCABULARY_PER_TILE

MEASURED = Path(__file__).parent / "results" / "gpu-nvidia-h200.json"

# NVIDIA's figures for bfloat16 without sparsity and for memory, times what large products were seen to reach there
# (21.4 TFLOP at the head in 27 ms), and what plain passes are taken to reach.
OPERATIONS_PER_SECOND = 0.8 * 989e12
BYTES_PER_SECOND = 0.9 * 4.8e12

# Bytes that compiled code moves for each logit, at least and at most.
FORWARD = (4 + 4, 2 * (4 + 4))  # z and r are read once, or once for the maximum and once for the exponentials
BACKWARD = (4 + 2, 4 + 2 + 4 + 4)  # read in float32, written in bfloat16; where the label's place splits it, twice more
ROUNDING = 4 + 2  # for each weight of the head: its gradient is read in float32 and kept in bfloat16
ADAMW = 7 * 2  # for each weight: read with gradient and two moments, written with two moments, in bfloat16

# All with tied embeddings, as the benchmark builds them.
SHAPES = {
    "two layers of Llama-3-8B": SETTINGS["llama3_8b_head"],
    "Llama-3.2-1B": SETTINGS["llama_1b_training"],
    "Llama-3-8B": replace(SETTINGS["llama3_8b_head"], layers=32, optimizer=True),
    "SmolLM2-135M": SETTINGS["smollm2_135m"],
}


@dataclass(frozen=True)
class Expected:
    """Operations and bytes of one step on one pair of `length` tokens a side, and the milliseconds they should take."""

    setting: Setting
    length: int

    @property
    def logits(self) -> int:
        return 2 * (self.length - PROMPT_TOKENS) * self.setting.vocabulary

    @property
    def head_operations(self) -> float:
        return 5 * 2 * self.logits * self.setting.hidden_size

    @property
    def layer_weights(self) -> int:
        one, key_value = self.setting, self.setting.hidden_size * self.setting.kv_heads // self.setting.heads
        attention = 2 * one.hidden_size**2 + 2 * one.hidden_size * key_value
        return one.layers * (attention + 3 * one.hidden_size * one.intermediate_size)

    @property
    def layer_operations(self) -> float:
        """Of weights, and of attention: half of each square, with a backward pass of two and a half forward ones."""
        weights = 4 * 2 * 2 * self.length * self.layer_weights
        square = 2 * 2 * self.length**2 * self.setting.hidden_size * self.setting.layers
        return weights + (1 + 1 + 2.5) * square

    @property
    def products_ms(self) -> float:
        return 1e3 * (self.head_operations + self.layer_operations) / OPERATIONS_PER_SECOND

    @property
    def head_share(self) -> float:
        return self.head_operations / (self.head_operations + self.layer_operations)

    def passes_ms(self, end: int) -> float:
        """Of passes over logits and over the head's gradient; `end` 0 for the least, 1 for the most."""
        head = self.setting.vocabulary * self.setting.hidden_size
        return 1e3 * (self.logits * (FORWARD[end] + BACKWARD[end]) + head * ROUNDING) / BYTES_PER_SECOND

    @property
    def adamw_ms(self) -> float:
        weights = self.layer_weights + self.setting.vocabulary * self.setting.hidden_size
        return 1e3 * ADAMW * weights / BYTES_PER_SECOND if self.setting.optimizer else 0.0

    def saved_ms(self, end: int) -> float:
        """What a kernel could save that keeps the logits of the forward pass on the chip: they are not read again."""
        return 1e3 * self.logits * FORWARD[end] / BYTES_PER_SECOND


def tile_rows() -> list[list[str]]:
    rows = []
    tile = TOKENS_PER_TILE * VOCABULARY_PER_TILE
    for hidden_size in (4096, 2048, 576):
        product = 2 * tile * hidden_size
        cells = [f"{hidden_size:,}", f"{product / 1e12:.2f}", f"{1e3 * product / OPERATIONS_PER_SECOND:.2f}"]
        for passes in (FORWARD, BACKWARD):
            low, high = (tile * each for each in passes)
            times = [f"{1e3 * each / BYTES_PER_SECOND:.2f}" for each in (low, high)]
            cells += [f"{low / 1e9:.2f} to {high / 1e9:.2f}", " to ".join(times)]
        rows.append(cells)
    return rows


def step_rows() -> list[list[str]]:
    rows = []
    for name, setting in SHAPES.items():
        step = Expected(setting, 2048)
        low, high = step.passes_ms(0), step.passes_ms(1)
        whole = step.products_ms + step.adamw_ms
        saved = [100 * step.saved_ms(end) / (whole + (low, high)[end]) for end in (0, 1)]
        rows.append(
            [
                name,
                f"{step.layer_operations / 1e12:.1f}",
                f"{step.head_operations / 1e12:.1f}",
                f"{100 * step.head_share:.0f} %",
                f"{step.products_ms:.1f}",
                f"{low:.1f} to {high:.1f}",
                f"{step.adamw_ms:.1f}",
                f"{saved[0]:.1f} to {saved[1]:.1f} %",
            ]
        )
    return rows


def measured_rows() -> list[list[str]]:
    rows = []
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["cost"]
    shapes = (("llama3_8b_head", "two layers of Llama-3-8B"), ("llama_1b_training", "Llama-3.2-1B"))
    for setting, name in shapes:
        costs = {(cost["length"], cost["contender"]): 1e3 * cost["seconds"] for cost in measured[setting]["costs"]}
        for length in SETTINGS[setting].lengths:
            step = Expected(SETTINGS[setting], length)
            expected = step.products_ms + step.adamw_ms + step.passes_ms(1)
            ours, peer = costs[length, OURS], costs[length, PEER]
            numbers = [f"{expected:.1f}", f"{ours:.1f}", f"{peer:.1f}", f"{ours / expected:.1f}"]
            rows.append([name, f"{length:,}", *numbers])
    return rows


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def tables() -> list[str]:
    return [
        as_markdown(
            ["hidden size", "TFLOP a product", "ms", "forward, GB", "ms", "backward, GB", "ms"],
            tile_rows(),
        ),
        as_markdown(
            [
                "at 2,048 tokens",
                "TFLOP in layers",
                "at the head",
                "share",
                "products, ms",
                "passes, ms",
                "AdamW, ms",
                "a fused forward saves",
            ],
            step_rows(),
        ),
        as_markdown(["", "tokens", "expected, ms", "measured", "TRL's DPO", "measured / expected"], measured_rows()),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
