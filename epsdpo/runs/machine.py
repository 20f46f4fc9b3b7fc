"""The machine that a stage ran on, as far as the last bits of its numbers depend on it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Variables that choose among ways to compute the same sums. torch, oneDNN and MKL read them when they are loaded.
_CHOOSE_ARITHMETIC = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)


def machine() -> dict[str, Any]:
    """Cores and GPUs, name of the processor, and those variables that are set and change its arithmetic."""
    return {
        "cpus": os.cpu_count(),
        "gpus": _gpu_names(),
        "processor": _processor(),
        "environment": {name: os.environ[name] for name in _CHOOSE_ARITHMETIC if name in os.environ},
    }


def _processor() -> str:
    """Its name, which Linux alone tells in full."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs, asked of the driver: asking torch would take GPU memory from the stages to come."""
    if shutil.which("nvidia-smi") is None:
        return []
    answer = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return answer.stdout.splitlines() if answer.returncode == 0 else []
