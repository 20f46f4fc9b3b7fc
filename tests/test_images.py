"""Dockerfiles, dev container and Binder, as far as they can be checked without a container engine.

`make test-image` runs their RUN lines; a workflow builds the images and runs the demo in one.
"""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from kit.dockerfile import copied, instructions
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
DOCKERFILES = [ROOT / "Dockerfile", ROOT / "Dockerfile.cuda"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERS = [
    ".dockerignore",
    ".devcontainer/devcontainer.json",
    "binder/postBuild",
    "binder/apt.txt",
    "binder/runtime.txt",
]
WORKFLOW = ROOT / ".github" / "workflows" / "images.yml"

each_dockerfile = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)


@each_dockerfile
def test_what_is_copied_is_in_the_repository(file):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name, rest in instructions(file):
        assert name != "ADD", "COPY fetches nothing"
        for source in copied(rest)[0] if name == "COPY" else ():
            assert source == "." or source in tracked, source


@each_dockerfile
def test_who_runs_it_is_not_root(file):
    """Whoever sets up is not, either: only the system's packages and the user are made by root."""
    stages = {}
    for name, rest in instructions(file):
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            user = stages.get(image, "root")
        elif name == "USER":
            user = rest
        elif name == "RUN":
            assert user != "root" or rest.startswith(("apt-get update", "useradd")), rest
        elif name == "COPY":
            assert "--chown=kit" in rest
        stages[stage] = user
    assert user == "kit"


@each_dockerfile
def test_run_lines_are_shell(file):
    runs = [rest for name, rest in instructions(file) if name == "RUN"]
    assert len(runs) == 3
    for run in runs:
        subprocess.run(["bash", "-n", "-c", run], check=True)
        assert "apt-get install" not in run or "rm -rf /var/lib/apt/lists/*" in run


@each_dockerfile
def test_indexes_are_given_by_whoever_builds(file):
    names = [rest for name, rest in instructions(file) if name == "ARG"]
    assert names[:2] == ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"]  # without a value: pip's own default


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda", *OTHERS, str(WORKFLOW.relative_to(ROOT))])
def test_no_file_names_a_host(name):
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links", (ROOT / name).read_text(encoding="utf-8"))


def test_both_images_set_up_alike():
    def set_up(file):
        found = instructions(file)
        return [each for each in found if each[0] in ("ARG", "COPY", "WORKDIR", "USER") or "make " in each[1]][-8:-1]

    assert set_up(DOCKERFILES[0])[-6:] == set_up(DOCKERFILES[1])[-6:]
    assert ("RUN", "make .venv/ready") in set_up(DOCKERFILES[0])


def test_the_files_that_are_copied_first_are_enough_to_install_the_package(tmp_path):
    """Built editable, as pip does, from these alone: it names a folder, in which what is copied later is found."""
    before = instructions(DOCKERFILES[0])
    for name, rest in before[: before.index(("RUN", "make .venv/ready"))]:
        for source in copied(rest)[0] if name == "COPY" else ():
            (tmp_path / source).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / source, tmp_path / source)
    build = "from setuptools.build_meta import build_editable as b; print(b('built'))"
    (tmp_path / "built").mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next((tmp_path / "built").glob("*.whl"))) as wheel:
        texts = [wheel.read(name).decode() for name in wheel.namelist() if name.startswith("__editable__")]
    assert any(str(tmp_path) in text for text in texts)
    needs = re.search(r"^\$\(READY\): (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert all((tmp_path / name).is_file() for name in needs.split())


def test_the_dev_container_is_the_first_stage_of_the_image():
    content = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    built = content["build"]
    file = ROOT / ".devcontainer" / built["dockerfile"]
    assert file.resolve() == DOCKERFILES[0] and built["context"] == ".."
    assert [rest.endswith(f" AS {built['target']}") for name, rest in instructions(file) if name == "FROM"][0]
    assert content["remoteUser"] == "kit" and content["postCreateCommand"] == "make .venv/ready"


def test_binder_makes_the_environment_of_the_kit():
    for name in ("binder/postBuild", ".ci/run"):
        subprocess.run(["bash", "-n", ROOT / name], check=True)
    assert (ROOT / "binder" / "postBuild").stat().st_mode & 0o111
    python = (ROOT / "binder" / "runtime.txt").read_text(encoding="utf-8").strip().removeprefix("python-")
    assert python in SpecifierSet(PROJECT["requires-python"])
    assert (ROOT / "binder" / "apt.txt").read_text(encoding="utf-8").split() == ["make"]


def test_a_workflow_builds_both_images_and_runs_the_demo():
    text = WORKFLOW.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.search(r"@[0-9a-f]{40}  # v[0-9.]+$", line) for line in text.splitlines() if "uses:" in line)
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert runs[1] == "docker run --rm epsdpo make demo"
    assert any("--file Dockerfile.cuda" in run for run in runs)
    assert all(0 < job["timeout-minutes"] <= 60 and "permissions" not in job for job in workflow["jobs"].values())
    assert all((ROOT / path).exists() for path in workflow[True]["push"]["paths"])  # YAML reads `on` as true
