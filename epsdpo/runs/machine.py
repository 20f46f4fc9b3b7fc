"""The machine that a stage runs on: what the last bits of its numbers depend on, and how much memory it may take."""

import contextlib
import math
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
_SECONDS = 20  # a driver that is broken may never answer


def machine() -> dict[str, Any]:
    """Cores and GPUs, name of the processor, and those variables that are set and change its arithmetic."""
    return {
        "cpus": os.cpu_count(),
        "gpus": _gpu_names(),
        "processor": _processor(),
        "environment": {name: os.environ[name] for name in _CHOOSE_ARITHMETIC if name in os.environ},
    }


def memory_limit() -> float:
    """Bytes that the machine has, or fewer where a container or a job is held to them; infinite if nothing says."""
    limits = [math.inf]
    with contextlib.suppress(AttributeError, OSError):  # as each system has them
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].partition("::/")[2]
        group = Path("/sys/fs/cgroup") / own
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
                limits.append(int((folder / "memory.max").read_text(encoding="utf-8")))
    return min(limits)


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
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return []
    return answer.stdout.splitlines() if answer.returncode == 0 else []
