"""Stages by forks of a warm process and by processes begun anew: the same bits, whatever another stage has spoilt."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
from kit import tiny_stages
from kit.official import OFFICIAL
from kit.tiny_kit import TinyKit

from epsdpo.batch.engine import _RULE_THREADS

# Times, and in what notebooks show also places in memory, names that are drawn, and the commit, which may be another by
# the time of the second run. A step of these models takes hundredths of a second, which tables show as such.
PASSING = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?|seconds\": [\d.e-]+|\(\d+ (?:s|min)\)|time per step \(s, median\)\D+[\d.]+"
    r"|\b0\.\d\d\b|T_[0-9a-f]{5}|0x[0-9a-f]+|\b[0-9a-f]{10}\b"
)
TIMED = ("notebook.ipynb", "notebook.html", "manifest.json", "stage.log", "progress.json", "index.html")


def run(folder: Path, **environment: str) -> str:
    command = [sys.executable, "-m", "epsdpo", "run", "configs", "--output", "run"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def came_out(run_dir: Path) -> dict[str, object]:
    """What a batch came to, by file, without times: bytes, and of notebooks what they show."""
    found: dict[str, object] = {}
    for file in sorted(run_dir.rglob("*")):
        name = str(file.relative_to(run_dir))
        if file.is_dir() or name.startswith(".epsdpo"):
            continue
        if file.name == "notebook.ipynb":
            outputs = [out for cell in nbformat.read(file, 4).cells for out in cell.get("outputs", [])]
            shown = json.dumps([out["data"] for out in outputs if "data" in out])
            found[name] = PASSING.sub("", shown)
        elif file.suffix == ".csv":
            found[name] = pd.read_csv(file, dtype=str).drop(columns="seconds", errors="ignore").to_csv(index=False)
        elif file.name not in TIMED:
            is_text = file.suffix in (".json", ".jsonl")
            found[name] = PASSING.sub("", file.read_text(encoding="utf-8")) if is_text else file.read_bytes()
    return found


def test_forks_and_processes_begun_anew_come_to_the_same_bits(tmp_path):
    """Data, record, weights, responses, judgements, tables, figures, and what the notebooks show."""
    models = tmp_path / "models"
    values = tiny_stages.settings(models)
    values["data"] = {"source": str(OFFICIAL / "pairs.jsonl")}
    del values["model"]["sft"]
    values["evaluate"] = {
        "prompts": {"source": str(models / "prompts.jsonl"), "column": "prompt"},
        "max_new_tokens": 12,
        "bootstrap_samples": 100,
        "judge": {"kind": "reward_model", "model": str(models / "reward")},
    }
    (tmp_path / "configs").mkdir()
    tiny_stages.write_config(values, tmp_path / "configs" / "tiny.yaml")

    assert "anew" not in run(tmp_path)
    (tmp_path / "run").rename(tmp_path / "forked")
    # A variable that the warm process has otherwise, for kernels, has stages begun anew.
    said = run(tmp_path, PYTHONWARNINGS="ignore:no such warning")
    assert "stages start anew, which takes them longer: its environment variable PYTHONWARNINGS" in said

    forked, anew = came_out(tmp_path / "forked"), came_out(tmp_path / "run")
    assert [name for name in {**forked, **anew} if forked.get(name) != anew.get(name)] == []
    kinds = {Path(name).suffix for name in forked}
    assert kinds >= {".safetensors", ".parquet", ".jsonl", ".csv", ".png", ".ipynb"}
    assert sum(name.endswith(".ipynb") for name in forked) == 5


SPOILS = """
import logging, os, random, signal, sys, threading, time, warnings
import numpy, torch
from epsdpo.methods import kernels
kernels.TOKENS_PER_TILE = 1
torch.relu = torch.nn.functional.relu = lambda tensor: tensor
torch.set_default_dtype(torch.float64)
torch.set_num_threads(2)
torch.use_deterministic_algorithms(True)
for module in (random, numpy.random):
    module.seed(1)
torch.manual_seed(1)
os.environ["SPOILT"] = "1"
sys.path.insert(0, "/spoilt")
sys.setrecursionlimit(12345)
logging.disable()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
threading.Thread(target=time.sleep, args=(3600,), daemon=True, name="spoilt").start()
spoilt = open(output_dir + "/spoilt", "w")
os.umask(0o77)
os.chdir("/")
warnings.simplefilter("error")
"""
LOOKS = """
import hashlib, logging, os, signal, sys, threading, warnings
import numpy, torch
from epsdpo.methods import kernels
from pandas import get_option
found = [
    kernels.TOKENS_PER_TILE, str(torch.get_default_dtype()), torch.get_num_threads(), sys.getrecursionlimit(),
    torch.are_deterministic_algorithms_enabled(), "SPOILT" in os.environ, os.environ["MPLBACKEND"], sys.path[:2],
    os.getcwd(), oct(os.umask(0o22)), logging.root.manager.disable, str(signal.getsignal(signal.SIGUSR1)),
    "spoilt" in {thread.name for thread in threading.enumerate()}, get_option("display.max_columns"),
    any("spoilt" in os.readlink(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{file}")),
    any(action == "error" for action, *_ in warnings.filters),
]
drawn = [float(numpy.random.rand()), float(torch.rand(1))]
torch.manual_seed(3)
layer = torch.nn.Linear(64, 64)
optimiser = torch.optim.Adam(layer.parameters())
for _ in range(5):
    torch.relu(layer(torch.randn(256, 64))).logsumexp(-1).mean().backward()
    optimiser.step()
found.append(hashlib.sha256(layer.weight.detach().numpy().tobytes()).hexdigest())
Path(output_dir, "found.json").write_text(json.dumps([found, drawn]))
"""


def add_cell(kit: TinyKit, notebook: str, code: str) -> None:
    path = kit.folder / "notebooks" / f"{notebook}.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(code))
    nbformat.write(book, path)


def write_study(kit: TinyKit) -> None:
    """The notebook of the stage that has all cores: what its kernel and its own process were given."""
    code = """
import json, os, torch
from pathlib import Path
own = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode().split(chr(0))
threads = [torch.get_num_threads(), sorted(line for line in own if "_THREADS=" in line)]
Path(output_dir, "threads.json").write_text(json.dumps(threads))
"""
    cells = [nbformat.v4.new_code_cell(text) for text in ("run_dir: str\noutput_dir: str", code)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), kit.folder / "notebooks" / "08_real_text.ipynb")


def test_a_stage_that_has_all_cores_computes_with_all_of_them(tmp_path, monkeypatch):
    """It is begun anew, which is as planned and not said; the stages before it are forks with a thread each."""
    for name in _RULE_THREADS:
        monkeypatch.delenv(name, raising=False)
    kit = TinyKit(tmp_path)
    kit.write_config("eps")
    write_study(kit)
    add_cell(kit, "02_train", "import torch; Path(output_dir, 'threads').write_text(str(torch.get_num_threads()))")
    code, out, err = kit.run("run", "configs", "--real-text")
    assert code == 0 and "anew" not in out, (out, err)
    run_dir = kit.folder / "runs" / "configs"
    assert (run_dir / "eps" / "train" / "threads").read_text() == "1"
    cores = os.cpu_count()
    given = sorted(f"{name}={cores}" for name in _RULE_THREADS)
    assert json.loads((run_dir / "real_text" / "threads.json").read_text()) == [cores, given]


def test_what_a_stage_spoils_no_other_finds(tmp_path):
    """To the bit as in processes begun anew, and the same manifest; forks draw numbers of their own all the same."""
    kit = TinyKit(tmp_path)
    kit.write_config("eps")
    add_cell(kit, "01_prepare_data", SPOILS)
    add_cell(kit, "02_train", LOOKS)
    code, out, err = kit.run("run", "configs")
    assert code == 0 and "anew" not in out, (out, err)
    found = kit.folder / "runs" / "configs" / "eps" / "train" / "found.json"
    (forked, drawn), manifest = json.loads(found.read_text()), kit.manifest("eps/train")

    threads = dict.fromkeys(_RULE_THREADS, "1")
    environment = {
        **os.environ,
        **threads,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "epsdpo", *manifest["command"][1:]]
    held, _ = os.pipe()
    begun = subprocess.run(command, cwd=tmp_path, env=environment, stdin=held, capture_output=True, text=True)
    assert begun.returncode == 0, begun.stderr
    anew, others = json.loads(found.read_text())
    assert forked == anew and not {*drawn} & {*others}
    ignored = ("started", "finished", "seconds", "outputs")
    again = kit.manifest("eps/train")
    assert {key: value for key, value in manifest.items() if key not in ignored} == {
        key: value for key, value in again.items() if key not in ignored
    }
