"""What to do when a run does not fit: the estimate in words, what the machine has, and settings that need less.

Remedies say where a setting is made and what it does to the result; that of least harm comes first. A run is never
stopped by an estimate, which is not a measurement.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PretrainedConfig

from epsdpo.methods.method_config import MethodConfig
from epsdpo.train.memory.estimate import MemoryEstimate, estimate_memory
from epsdpo.train.memory.setting import FLOAT32, ModelShape, Setting

_PARTS = {
    "policy": "policy weights",
    "reference": "reference weights",
    "optimiser": "optimiser state",
    "buffers": "buffers for exchanging gradients",
    "gradients": "gradients",
    "gathered_reference": "weights gathered for the reference's pass",
    "gathered_policy": "weights gathered or cast for the policy's pass",
    "activations": "activations",
    "head": "pass over the heads",
    "layer_backward": "backward pass of one layer",
    "embedding": "second gradient of the tied embedding",
    "update": "optimiser step",
}
_WORTH_A_CHANGE = 0.02  # of the peak; a remedy that saves less is not named


class OutOfMemory(RuntimeError):
    """A run that the machine's memory did not hold. The message names step, peak and settings that need less."""


@dataclass(frozen=True)
class MemoryOutlook:
    """A run's need for memory beside what there is.

    Attributes:
        setting: what decides the need.
        config: the model's, for estimating changes to the model.
        available: bytes that one process may take; None where torch cannot say (a device other than CUDA and CPU).
        place: words for where they are.
    """

    setting: Setting
    config: PretrainedConfig
    available: int | None
    place: str

    @classmethod
    def of_run(
        cls, config: PretrainedConfig, args: MethodConfig, data: Dataset, adapters: LoraConfig | None = None
    ) -> MemoryOutlook:
        """The outlook of a run on tokenised pairs, of all weights or of `adapters`, before anything of it is loaded."""
        available, place = available_memory(args.device)
        return cls(Setting.of_run(ModelShape.of(config, adapters), args, data), config, available, place)

    @property
    def estimate(self) -> MemoryEstimate:
        return estimate_memory(self.setting)

    @property
    def fits(self) -> bool:
        """Whether the estimate is no larger than what there is, as far as that is known."""
        return self.available is None or self.estimate.peak <= self.available

    def table(self) -> str:
        """The estimate in lines: its parts, and the moment when most of them meet."""
        setting, estimate = self.setting, self.estimate
        processes = setting.sharding.processes
        of_many = f", one of {processes} ({setting.sharding.kind})" if processes > 1 else ""
        checkpointing = ", activations recomputed" if setting.checkpointing else ""
        lines = [
            f"Estimated memory of this process{of_many}: {setting.sequences} sequences of up to {setting.tokens} tokens"
            f"{checkpointing}"
        ]
        width = max(map(len, _PARTS.values()))
        for name, label in _PARTS.items():
            if getattr(estimate, name):
                lines.append(f"  {label:<{width}} {_readable(getattr(estimate, name)):>10}")
        moment = max(estimate.moments, key=estimate.moments.get)
        there = "" if self.available is None else f"; there are {self._there()}"
        lines.append(f"  {'most at once':<{width}} {_readable(estimate.peak):>10} ({moment}){there}")
        return "\n".join(lines)

    def warning(self) -> str:
        """What to say when the run does not seem to fit."""
        return (
            f"By the estimate training needs {_readable(self.estimate.peak)}, but there are {self._there()}. "
            f"It starts nevertheless. {self.advice()}"
        )

    def failure(self, error: BaseException, when: str) -> str:
        """What to say after memory ran out: `when`, how much was taken, what was expected, and what would help."""
        there = "" if self.available is None else f"; before it there were {self._there()}"
        return (
            f"out of memory {when}: {_first_line(error)}\n"
            f"This process had taken {_readable(peak_memory(self.setting.device))} at most. The estimate was "
            f"{_readable(self.estimate.peak)}{there}. {self.advice()}"
        )

    def _there(self) -> str:
        return f"{_readable(self.available)} {self.place}"

    def advice(self) -> str:
        """The remedies that are not in force yet, a line each with what it saves."""
        peak = self.estimate.peak
        lines = []
        for text, changed in self._remedies():
            saved = peak - estimate_memory(changed).peak
            if saved >= _WORTH_A_CHANGE * peak:
                lines.append(f"  - {text} (saves about {_readable(saved)})")
        if not lines:
            return "No setting of this run would save much: use a smaller model, or a machine with more memory."
        return "\n".join(["What would help, the least harm to the result first:", *lines])

    def _remedies(self) -> list[tuple[str, Setting]]:
        """Changes of one setting each, those that leave the result alone first."""
        setting, model = self.setting, self.setting.model
        remedies = []
        if setting.pairs > 1:
            fewer = max(number for number in range(1, setting.pairs) if setting.pairs % number == 0)
            text = (
                f"train.per_device_train_batch_size: {fewer} in place of {setting.pairs}; the result stays, because "
                "train.global_batch_size does"
            )
            accumulation = setting.accumulation * setting.pairs // fewer
            remedies.append((text, replace(setting, pairs=fewer, accumulation=accumulation)))
        if setting.attention == "eager":
            text = "model.attn_implementation: sdpa in place of eager; the result stays up to rounding"
            remedies.append((text, replace(setting, attention="sdpa")))
        if not setting.checkpointing:
            # One forward pass of the policy more, on top of two forward passes and a backward pass worth two.
            text = "train.activation_checkpointing: true; the result stays, a step takes about a quarter longer"
            remedies.append((text, replace(setting, checkpointing=True)))
        if setting.device != "cpu":  # processes on one machine's CPU share its memory, and gain nothing
            remedies.append(self._more_sharing())
        if setting.weight_bytes == FLOAT32:
            text = "model.dtype: bfloat16 with train.bf16: true; other rounding, so the result moves a little"
            remedies.append((text, replace(setting, weight_bytes=2, mixed_precision=True)))
        if not model.adapted:
            text = (
                "adapters in place of all weights, by model.lora: {} (from Python: peft_config); another method, with "
                "a result of its own"
            )
            lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
            remedies.append((text, replace(setting, model=ModelShape.of(self.config, lora))))
        half = setting.tokens // 2
        text = f"train.max_length: {half} (the longest pair has {setting.tokens}); it cuts pairs, so the data change"
        completion = min(setting.completion_tokens, half)
        remedies.append((text, replace(setting, tokens=half, completion_tokens=completion)))
        return remedies

    def _more_sharing(self) -> tuple[str, Setting]:
        sharding, shared = self.setting.sharding, "GPUs share weights, gradients and optimiser state"
        if sharding.share("weights") < 1:
            sharding = replace(sharding, processes=2 * sharding.processes)
            text = f"accelerate launch --num_processes {sharding.processes}: more {shared}; the result stays"
        else:
            # In bfloat16 throughout, a run on whole copies rounds more than the same run on shares.
            rounds = self.setting.mixed_precision and self.setting.weight_bytes < FLOAT32 and not sharding.deepspeed
            result = "they train in float32, so the result moves a little" if rounds else "the result stays"
            sharding = replace(sharding, kind="FSDP", processes=max(2, sharding.processes))
            text = (
                "accelerate launch --config_file configs/accelerate/fsdp2.yaml (or zero3.yaml) --num_processes "
                f"{sharding.processes}: {shared}; {result}"
            )
        return text, replace(self.setting, sharding=sharding)


def available_memory(device: torch.device) -> tuple[int | None, str]:
    """Bytes that a process may take on `device`, and words for where they are; None where torch cannot say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"free on {device}"
    if device.type != "cpu":
        return None, str(device)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole // processes, "in this machine" + (f" for each of {processes} processes" if processes > 1 else "")


def peak_memory(device: str) -> int:
    """The most that this process has taken so far, in bytes: of torch's tensors on a GPU, of everything on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator says so in a plain RuntimeError only."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
