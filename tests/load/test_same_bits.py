"""One batch of real notebooks on tiny models, by forks of a warm process and by processes begun anew: the same bits."""

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
