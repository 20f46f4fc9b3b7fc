"""What every command sees to first: the right Python, open files, output that a reader leaves or that knows no β."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from epsdpo.batch.startup import MODULES, OPEN_FILES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python without any package."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.mark.parametrize("module", ["epsdpo", "epsdpo.train", "epsdpo.train.sft", "epsdpo.paper.epsilon_bound"])
def test_a_python_without_the_packages_is_told_what_to_activate(bare_python, module, tmp_path):
    shutil.copytree(ROOT / "epsdpo", tmp_path / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", tmp_path)
    call = [bare_python, "-m", module, "--help"]
    environment = {"PATH": os.environ["PATH"]}
    before = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert before.returncode == 2 and "Traceback" not in before.stderr
    assert re.match(rf"epsdpo: {bare_python} lacks .*psutil.*torch.*yaml", before.stderr)
    assert f"In {tmp_path}, `make demo`" in before.stderr
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    after = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"`. {tmp_path}/.venv/bin/activate`" in after.stderr


def test_what_is_looked_for_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["kit"]]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in needed}
    assert {"pyyaml" if name == "yaml" else name for name in MODULES} <= names


def limited(limit, hard):
    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from epsdpo.batch.startup import prepare; import resource; prepare(); "
            "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])",
        ],
        cwd=ROOT,
        preexec_fn=limits,
        capture_output=True,
        text=True,
    )


def test_too_few_open_files_are_raised_or_named():
    refused = limited(64, 64)
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"epsdpo: this process may open 64 files (`ulimit -n`), and {OPEN_FILES} are needed"
    )
    assert limited(64, OPEN_FILES).stdout == f"{OPEN_FILES}\n"


def test_output_in_ascii_ends_nothing():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    call = [sys.executable, "-m", "epsdpo", "config", "--explain", "evaluate.judge"]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\\xb7" in done.stdout


@pytest.mark.parametrize("command", ["config --explain evaluate.judge", "status nowhere", "winrate nowhere", "--help"])
def test_a_reader_that_has_seen_enough_sees_no_traceback(command, tmp_path):
    errors = tmp_path / "errors"
    line = f"{{ {sys.executable} -m epsdpo {command} 2>&1; echo $? > {tmp_path}/code; }} 2> {errors} | true"
    subprocess.run(["bash", "-c", line], cwd=ROOT, check=True)
    assert int((tmp_path / "code").read_text()) in (0, 2)
    assert errors.read_text() == ""
    line = f"{sys.executable} -m epsdpo {command} 2> {errors} | true"
    subprocess.run(["bash", "-c", line], cwd=ROOT, check=True)
    assert "Traceback" not in errors.read_text() and "BrokenPipe" not in errors.read_text()


WINDOWS = """
import sys
sys.platform = "win32"
class NotThere:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource", "termios"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, NotThere())
"""


@pytest.mark.parametrize(
    ("command", "code"), [("epsdpo run configs/demo", 2), ("epsdpo.train --help", 2), ("epsdpo doctor", 1)]
)
def test_on_windows_a_command_says_at_once_what_to_use(command, code, tmp_path):
    """By a Python that says it is there and lacks the modules that are not: nothing of the kit ran on a Windows."""
    (tmp_path / "sitecustomize.py").write_text(WINDOWS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    call = [sys.executable, "-m", *command.split()]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "Use WSL 2: `wsl --install`" in " ".join((done.stdout + done.stderr).split())
