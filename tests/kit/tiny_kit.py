"""A copy of the kit whose notebooks do next to nothing, but do it as the real ones: for tests of the runner alone.

Processes, kernels, Snakemake, manifests and pages are real. Each stage adds a line to `started.log` when it begins, so
that a test can tell what was run how often; training records its steps one by one and goes on where it stopped.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import psutil
import yaml

REPOSITORY = Path(__file__).parents[2]
STEPS = 4

_BEGIN = """
import json, os, time
from pathlib import Path
import yaml
with open({log!r}, "a") as log:
    log.write(output_dir + "\\n")
"""

_NOTEBOOKS = {
    "01_prepare_data": ("config: str\noutput_dir: str", "Path(output_dir, 'train.parquet').write_text('pairs')"),
    "02_train": (
        "config: str\ndata_dir: str\noutput_dir: str\nlive: bool = True",
        """
train = yaml.safe_load(Path(config).read_text())["train"]
record = Path(output_dir, "steps.jsonl")
Path(output_dir, "progress.json").write_text(json.dumps({"total_steps": STEPS}))
done = len(record.read_text().splitlines()) if record.exists() else 0
for step in range(done + 1, STEPS + 1):
    if train["learning_rate"] == 0.5:
        raise RuntimeError("<b>learning_rate</b> is too high")
    time.sleep(train["beta"] if train["beta"] > 1 else 0)
    if train.get("weight_decay") == 1.0 and not Path("filled").exists():
        Path("filled").touch()
        with open("runs/ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(2**12))
    row = {"step": step, "beta_before": 0.1, "beta_after": 0.1 - 0.01 * step, "loss": 0.7, "seconds": 0.1}
    with record.open("a") as file:
        file.write(json.dumps(row) + "\\n")
Path(output_dir, "model").mkdir(exist_ok=True)
""",
    ),
    "03_beta_trajectory": (
        "train_dir: str\ncompare_with: str = ''\ndata_dir: str\noutput_dir: str",
        "len(Path(train_dir, 'steps.jsonl').read_text().splitlines())",
    ),
    "04_evaluate": (
        "config: str\ndata_dir: str\ntrain_dir: str\nkeep_answers_in: str = ''\noutput_dir: str",
        "1 + 1",
    ),
    "05_report": (
        "run_dir: str\nlinks_from: str\noutput_dir: str",
        "sorted(path.parent.name for path in Path(run_dir).glob('*/train'))",
    ),
}


class TinyKit:
    """The copy in `folder`, with the means to run it and to hurt it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "started.log"
        # With its bytecode, but for what another process is writing of it.
        shutil.copytree(REPOSITORY / "epsdpo", folder / "epsdpo", ignore=shutil.ignore_patterns("*.pyc.*"))
        (folder / "notebooks").mkdir()
        for name, (parameters, code) in _NOTEBOOKS.items():
            book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
            cells = [parameters, _BEGIN.format(log=str(self.log)), code.replace("STEPS", str(STEPS)).strip()]
            book.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
            book.cells[0].metadata["tags"] = ["parameters"]
            nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")
        (folder / "configs").mkdir()

    def write_config(self, name: str, method: str = "epsilon_dpo", **train: object) -> None:
        values = {"method": method, "train": {"beta": 0.1, "learning_rate": 1.0e-6, **train}}
        (self.folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.folder), os.environ.get("PYTHONPATH", "")]),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "epsdpo", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, timeout: float = 300) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `python -m epsdpo ...`."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, out, err

    def started(self) -> Counter:
        """How often each stage began, by its folder in the run folder."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return Counter(line.split("/", 2)[-1] for line in lines)

    def manifest(self, stage: str) -> dict:
        return json.loads((self.folder / "runs" / "configs" / stage / "manifest.json").read_text(encoding="utf-8"))

    def processes(self) -> list[psutil.Process]:
        """Everything that runs for this kit, kernels and Snakemake included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
