"""The package as it is installed: what each side of it imports, the library without the kit, and what a wheel holds."""

import ast
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from kit.official import OFFICIAL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "epsdpo"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LIBRARY = [PACKAGE / "__init__.py", PACKAGE / "files.py", *(PACKAGE / "methods").glob("*.py")]
KIT = sorted(set(PACKAGE.rglob("*.py")) - set(LIBRARY))

# What the face takes of the kit, for its commands.
SAY_WHAT_IS_MISSING = {"epsdpo.batch.doctor", "epsdpo.batch.startup"}
# What is there to be run and not imported.
RUN = {"jupyterlab"}


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def imported(files):
    """The distributions that modules import, wherever in them."""
    owners, found = packages_distributions(), set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"epsdpo"}
            # What is not installed goes by the name of its module.
            found |= {canonicalize_name(owners.get(top, [top])[0]) for top in tops}
    return found


def test_the_library_declares_what_it_imports_and_nothing_else():
    assert imported(LIBRARY) == names(PROJECT["dependencies"])


def test_the_kit_declares_what_it_imports_and_nothing_else():
    optional = names([*EXTRAS["benchmarks"], *EXTRAS.get("vllm", ())])
    own = imported(KIT) - names(PROJECT["dependencies"]) - optional
    assert own == names(EXTRAS["kit"]) - RUN


def test_the_library_imports_none_of_the_kits_rooms():
    for file in LIBRARY:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("epsdpo."):
                room = node.module.split(".")[1]
                assert room in ("methods", "files") or node.module in SAY_WHAT_IS_MISSING, (file.name, node.module)


@pytest.fixture(scope="module")
def library_alone(tmp_path_factory):
    """A folder with the packages that `pip install epsdpo` would bring, and no others."""
    site = tmp_path_factory.mktemp("alone") / "site-packages"  # the name by which dill knows installed packages
    site.mkdir()
    pending, seen = [Requirement(line) for line in PROJECT["dependencies"]], set()
    while pending:
        need = pending.pop()
        if str(need) in seen:
            continue
        seen.add(str(need))
        try:
            installed = distribution(need.name)
        except PackageNotFoundError:
            continue  # of another platform
        for brought in map(Requirement, installed.requires or []):
            if brought.marker is None or any(
                brought.marker.evaluate({"extra": extra}) for extra in need.extras or {""}
            ):
                pending.append(brought)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            target, link = Path(sysconfig.get_path("purelib")) / top, site / top
            if target.exists() and not link.exists():
                link.symlink_to(target)
    assert not (site / "sklearn").exists() and (site / "trl").exists()
    return site


TRAINED_WITHOUT_THE_KIT = f"""
import json, sys
from pathlib import Path
from epsdpo import EpsilonDPOConfig, EpsilonDPOTrainer, read_pairs, read_steps
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

official = Path({str(OFFICIAL)!r})
rows = [json.loads(line) for line in (official / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
trainer = EpsilonDPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(official / "policy"),
    ref_model=AutoModelForCausalLM.from_pretrained(official / "ref"),
    args=EpsilonDPOConfig(
        output_dir="run", max_steps=2, per_device_train_batch_size=4, bf16=False, use_cpu=True, report_to="none"
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(official / "tok"),
)
trainer.train()
assert read_steps("run")["step"].tolist() == [1, 2] and len(read_pairs("run")) == 8
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""


def test_the_library_trains_and_reads_its_record_without_the_kit(library_alone, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-S", "-c", TRAINED_WITHOUT_THE_KIT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(library_alone), "PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    kits = {"IPython", "jupyter_client", "matplotlib", "nbconvert", "nbformat", "papermill", "sklearn", "snakemake"}
    assert {"epsdpo", "torch", "trl"} <= loaded and not loaded & kits


def test_a_command_without_the_kit_says_what_it_lacks(library_alone, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-S", "-m", "epsdpo.train", "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(library_alone)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "lacks peft" in done.stderr, done.stderr
    assert "pip install 'epsdpo[kit]'" in done.stderr


def test_a_wheel_holds_every_room_and_every_file(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "epsdpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "-w", tmp_path, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("epsdpo-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("epsdpo/")}
    assert held == {f"epsdpo/{file.relative_to(source / 'epsdpo').as_posix()}" for file in files_of(source / "epsdpo")}


def files_of(folder):
    return [file for file in folder.rglob("*") if file.is_file()]
