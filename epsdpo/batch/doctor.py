"""`python -m epsdpo doctor`: what is here, what that is enough for, and the command for what is missing.

It imports nothing but the standard library and asks packages that may be broken in processes of their own, each with a
limit of time: it answers where no other command starts. No model is loaded and nothing is written.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from epsdpo.batch.startup import REPOSITORY, let_output_pass, open_files_problem, python_problem, system_problem
from epsdpo.runs.machine import machine, memory_limit

_GIB = 2**30
# In GiB. Measured: a stage and its batch took 1.4 GB of memory, the demo's runs 58 MB, those of the miniature 20 MB for
# each of 175 trainings, those of the real model 15 GB.
_DEMO_MEMORY, _DEMO_DISK, _MINIATURE_DISK, _REAL_MINI_DISK = 2, 1, 4, 15

# Each prints one JSON object as its last line.
_TORCH = """
import json, torch, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    here = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(each) for each in range(torch.cuda.device_count() if here else 0)]
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda or torch.version.hip,
    "gpus": [[gpu.name, gpu.total_memory] for gpu in gpus],
    "mps": torch.backends.mps.is_available(),
    "said": str(said[-1].message).splitlines()[0] if said else "nothing",
}))
"""
_HUB = """
import json, urllib.request
from huggingface_hub import constants
if not constants.HF_HUB_OFFLINE:
    urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=4).close()
print(json.dumps({"asked": not constants.HF_HUB_OFFLINE, "address": constants.ENDPOINT}))
"""
_FONT = """
import json
from matplotlib import font_manager as fonts
print(json.dumps({"name": fonts.get_font(fonts.findfont(fonts.FontProperties())).family_name}))
"""
_SECONDS = {_TORCH: 120, _HUB: 6, _FONT: 30}
_LATE = "no answer within"


@dataclass
class _Found:
    """What is here, and what is missing, with its command; the demo cannot do without what is in `fatal`."""

    here: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    fatal: list[str] = field(default_factory=list)


def doctor() -> int:
    """Print what was found; return 0 if the demo can run here and 1 if not. A missing GPU or hub is no failure."""
    let_output_pass()
    asked = {code: subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) for code in _SECONDS}
    found = _Found()
    _look_at_python(found)
    torch, hub, font = (_answer(asked[code], _SECONDS[code]) for code in _SECONDS)
    _look_at_torch(found, torch)
    free = _look_at_room(found)
    _look_at_hub(found, hub)
    _look_at_figures(found, font)
    gpus = [size / _GIB for _, size in torch.get("gpus", [])]
    _print(f"What is here ({Path.cwd()}):", found.here)
    _print("What it is enough for:", _enough_for(found, free, gpus))
    needs = [*found.fatal, *found.missing]
    _print("What is missing:" if needs else "Nothing is missing.", [("-", need) for need in needs])
    return 1 if found.fatal else 0


def _print(heading: str, lines: Iterable[tuple[str, str]]) -> None:
    print(heading)
    for name, text in lines:
        start = "  - " if name == "-" else f"  {name:<14} "
        print(start + f"\n{' ' * len(start)}".join(textwrap.wrap(text, 100 - len(start), break_on_hyphens=False)))


def _answer(process: subprocess.Popen, seconds: int) -> dict:
    """What a process printed, or as "error" what it died of, in a line."""
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"{_LATE} {seconds} seconds"}
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    last = (errors.strip().splitlines() or [f"ended by signal {-process.returncode}"])[-1]
    return {"error": re.sub(r"^[\w.]+: <?(urlopen error )?|>$", "", last)}


def _look_at_python(found: _Found) -> None:
    system = f"{platform.system()} {platform.machine()}"
    found.here.append(("Python", f"{platform.python_version()}, {sys.executable} ({system})"))
    problems = [system_problem(), python_problem(), open_files_problem()]
    found.fatal += [problem.removeprefix("epsdpo: ") for problem in problems if problem]
    lock, project = REPOSITORY / "requirements.lock", REPOSITORY / "pyproject.toml"
    if not (lock.is_file() and project.is_file()):
        found.here.append(("packages", "not compared: there is no requirements.lock here"))
        found.fatal.append("configs and notebooks, which only the repository has: clone it, and use the kit from there")
        return
    pinned = _pinned(lock.read_text(encoding="utf-8"))
    has = {_normal(each.name): each.version.partition("+")[0] for each in metadata.distributions()}
    others = [f"{name} {has[name]} for {pin}" for name, pin in pinned.items() if has.get(name, pin) != pin]
    lacks = [name for name in pinned if name not in has]
    text = f"{len(pinned) - len(others) - len(lacks)} of {len(pinned)} as in requirements.lock"
    text += f"; others: {_some(others)}" if others else ""
    found.here.append(("packages", text + (f"; not here: {_some(lacks)}" if lacks else "")))
    ranges = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    direct = [*ranges["dependencies"], *ranges["optional-dependencies"]["kit"]]
    unmet = sorted({_normal(re.match(r"[\w.-]+", line)[0]) for line in direct} & set(lacks))
    install = f"`make -B .venv/ready` in {REPOSITORY}"
    if unmet and not python_problem():  # which would have named some of them
        found.fatal.append(f"packages: {_some(unmet)}. {install}")
    elif not unmet and (others or lacks):
        found.missing.append(f"the versions of the lock, with which the published runs were made: {install}")


def _pinned(lock: str) -> dict[str, str]:
    """Package → version of the lines of a lock that are for this platform."""
    pinned = {}
    for name, version, marker in re.findall(r"^([\w.-]+)==([\w.]+)[ \t]*;?([^\\\n]*)", lock, re.MULTILINE):
        with contextlib.suppress(ImportError):  # it may be missing, too
            from packaging.markers import Marker

            if marker.strip() and not Marker(marker).evaluate():
                continue
        pinned[_normal(name)] = version
    return pinned


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _look_at_torch(found: _Found, torch: dict) -> None:
    again = f"`{sys.executable} -m pip install --force-reinstall torch==VERSION`; docs/machines.md says from where"
    seen = machine()["gpus"]  # by the driver
    gpus = [f"{name}, {size / _GIB:.1f} GiB" for name, size in torch.get("gpus", [])]
    shown = "; ".join(f"{gpus.count(each)} × {each}" for each in dict.fromkeys(gpus))
    if torch.get("error", "").startswith(_LATE):  # which does not say that it would not load
        found.here.append(("torch", torch["error"]))
        found.missing.append("an answer of torch: this machine is busy, or the disk with its packages slow. Ask again")
    elif "error" in torch:
        found.here.append(("torch", f"does not load: {torch['error']}"))
        path = "LD_LIBRARY_PATH is set: try `env -u LD_LIBRARY_PATH`, or " if "LD_LIBRARY_PATH" in os.environ else ""
        found.fatal += [] if python_problem() else [f"a torch that loads: {path}{again}"]
    else:
        built = f"built for CUDA or ROCm {torch['cuda']}" if torch["cuda"] else "built without CUDA"
        found.here.append(("torch", f"{torch['version']}, {built}"))
        if seen and not gpus:
            found.missing.append(f"a torch that sees the GPU: {_why_unseen(torch, again)}")
    if seen and not gpus:
        shown = f"the driver has {_some(seen)}; torch sees none"
    found.here.append(("GPUs", shown or ("Apple's (MPS), on which nothing was tried" if torch.get("mps") else "none")))


def _why_unseen(torch: dict, again: str) -> str:
    if not torch["cuda"]:
        return f"this one is built for CPUs. {again}"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}. `unset CUDA_VISIBLE_DEVICES`"
    return f"it says: {torch['said']}. Compare its CUDA with the driver's, `nvidia-smi`"


def _look_at_room(found: _Found) -> float:
    """Look at memory and disk; return the GiB that are free where runs go."""
    memory, runs = memory_limit() / _GIB, Path("runs").absolute()
    place = next(each for each in (runs, *runs.parents) if each.is_dir())
    free = shutil.disk_usage(place).free / _GIB
    found.here.append(("cores, memory", f"{os.cpu_count()} cores, {memory:.1f} GiB for processes"))
    found.here.append(("disk", f"{free:.1f} GiB free for {runs}"))
    if memory < _DEMO_MEMORY:
        found.fatal.append(f"memory: the demo takes {_DEMO_MEMORY} GiB. Ask for it where you submit or log in")
    if free < _DEMO_DISK:
        found.fatal.append(f"disk: the demo takes up to {_DEMO_DISK} GiB. Free some in {place}, or use --output DIR")
    if not os.access(place, os.W_OK):
        found.fatal.append(f"a folder to write to: {place} is none. Use --output DIR")
    return free


def _look_at_hub(found: _Found, hub: dict) -> None:
    if "error" in hub:
        found.here.append(("hub", f"does not answer: {hub['error']}"))
        found.missing.append(
            "the hub, for configs/small and configs/paper alone: HTTPS_PROXY or HF_ENDPOINT name a way there; or fill "
            "its cache, HF_HOME, where there is a network, and `export HF_HUB_OFFLINE=1` here"
        )
    else:
        found.here.append(("hub", f"{hub['address']} answers" if hub["asked"] else "not asked: HF_HUB_OFFLINE is set"))


def _look_at_figures(found: _Found, font: dict) -> None:
    found.here.append(("font", font.get("name") or font["error"]))
    found.here.append(("Chromium", shutil.which("chromium") or "none"))
    if not shutil.which("chromium"):
        found.missing.append("Chromium, for `make test-browser` alone: `apt-get install chromium`, or one on the PATH")


def _enough_for(found: _Found, free: float, gpus: list[float]) -> Iterator[tuple[str, str]]:
    no = "no: see what is missing" if found.fatal else ""
    yield "demo", no or "yes: `make demo`, about 6 minutes on two cores"
    for name, disk in (("paper-mini", _MINIATURE_DISK), ("real-mini", _REAL_MINI_DISK)):
        short = f"no: it takes {disk} GiB of disk, and {free:.1f} are free" if free < disk else ""
        yield name, no or short or f"yes: `make {name}`, about 90 minutes on two cores, {disk} GiB of disk"
    for name in ("small", "paper"):
        needs = [*memory_of_configs(REPOSITORY / "configs" / name).values()]
        yield f"configs/{name}", _fitting(name, needs, gpus) if needs else no


def _fitting(name: str, needs: list[tuple[int, float]], gpus: list[float]) -> str:
    """How many of a folder's configs fit into the GPUs, by the estimate of `train.memory` that their heads state."""
    wants: dict[int, list[float]] = {}
    for processes, size in needs:
        if sum(gpu >= size for gpu in gpus) < processes:
            wants.setdefault(processes, []).append(size)
    if not wants:
        return f"yes: by estimate all {len(needs)} files fit, with the models that the hub has"
    larger = " or ".join(f"{count} of {max(sizes)} GiB" for count, sizes in sorted(wants.items()))
    fits = len(needs) - sum(map(len, wants.values()))
    some = f"{fits} of {len(needs)} files fit" if fits else "no"
    check = f"; for other numbers: `python -m epsdpo check configs/{name} --num-processes N`" if max(wants) > 1 else ""
    return f"{some}; by estimate all of them need GPUs of this memory: {larger}{check}"


def memory_of_configs(folder: Path) -> dict[str, tuple[int, float]]:
    """GPUs, and GiB on each, that the heads of the configs in a folder's folders state."""
    found = {}
    for file in sorted(folder.glob("*/[!_]*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        head = " ".join(line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines))
        stated = re.search(r"kit's estimate: ([\d.]+) GiB(?: in each of (\d+) processes)?", head)
        found[f"{file.parent.name}/{file.stem}"] = int(stated[2] or 1), float(stated[1])
    return found
