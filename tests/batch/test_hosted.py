"""The notebooks' first cell, for Colab and Kaggle: the same in all, without effect elsewhere, and what it does there.

Neither service is here: their variables are set, git is real, and what pip would be asked is written down.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from epsdpo.runs.layout import NOTEBOOKS

ROOT = Path(__file__).parents[2]
SERVICES = ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def first_code(notebook: Path) -> tuple[dict, dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    first, second, *_ = [cell for cell in cells if cell["cell_type"] == "code"]
    return first, second


CELL = "".join(first_code(NOTEBOOKS / "02_train.ipynb")[0]["source"])
SHOW = "\nprint(Path.cwd(), sys.path[0])\n"
PIP = '#!/bin/sh\necho "$*" > asked\nfor last in "$@"; do :; done\ncp "$last" given\n'


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_begins_with_it_and_goes_on_with_its_parameters(notebook):
    first, parameters = first_code(notebook)
    assert "".join(first["source"]) == CELL and first["metadata"]["tags"] == ["hosted"]
    assert parameters["metadata"]["tags"] == ["parameters"]


def run(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    given = {name: value for name, value in os.environ.items() if name not in SERVICES}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, cwd=folder, env=given | variables, capture_output=True, text=True)


def test_elsewhere_it_does_nothing(tmp_path):
    done = run(CELL + SHOW, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path} \n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("service", SERVICES)
def test_without_an_address_it_says_where_to_write_one(service, tmp_path):
    done = run(CELL, tmp_path, **{service: "x"})
    assert done.returncode == 1 and "Write the address of the kit's git repository into this cell" in done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_there_it_fetches_the_tag_of_this_version_and_installs_all_but_the_service_s_own(service, tmp_path):
    published, work = tmp_path / "published", tmp_path / "work"
    published.mkdir()
    work.mkdir()
    (published / "requirements.lock").write_bytes((ROOT / "requirements.lock").read_bytes())
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (
        ["init", "-q"],
        ["add", "."],
        ["commit", "-qm", "x"],
        ["tag", f"v{VERSION}"],
        ["rm", "-q", "-r", "."],
    ):
        subprocess.run([*git, *command], cwd=published, check=True)
    (tmp_path / "python").write_text(PIP, encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    code = CELL.replace('repository, version = ""', f"repository, version = {str(published)!r}")
    code = f"import sys\nsys.executable = {str(tmp_path / 'python')!r}\n{code}{SHOW}"
    done = run(code, work, **{service: "x"})
    assert done.returncode == 0, done.stderr
    kit = work / "epsdpo"
    assert done.stdout.splitlines()[-1] == f"{kit} {kit}"
    assert (work / "asked").read_text(encoding="utf-8").startswith("-m pip install -q --no-deps -r ")
    names = [line.partition("==")[0] for line in (work / "given").read_text("utf-8").splitlines() if line[:1].isalpha()]
    assert {"transformers", "trl", "peft", "pydantic"} <= set(names)
    assert not {"torch", "ipykernel", "ipython", "jupyterlab", "nbclient", "notebook", "tornado"} & set(names)
    again = run(code, work, **{service: "x"})
    assert again.stdout == f"{kit} {kit}\n", "it was fetched twice"
    inside = run(code, kit, **{service: "x"})
    assert inside.stdout == f"{kit} {kit}\n", "it was looked for in itself"
