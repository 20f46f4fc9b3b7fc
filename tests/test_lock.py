"""requirements.lock on every platform that it is for: one version of everything, with hashes, and nothing left out.

Markers are evaluated as pip does on the platform in question. What a package needs there is read from the packages that
are installed here: where their files differ by platform, what they need does not.
"""

import re
import tomllib
from functools import cache
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = ["kit", "dev"]
DIRECT = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], PYPROJECT["build-system"]["requires"])
    + tuple(PROJECT["optional-dependencies"][extra] for extra in EXTRAS)
    for line in lines
]
COMMENTS, LINES = [], []
for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
    (COMMENTS if line.startswith("#") else LINES).append(" ".join(line.split()))
LOCK = [Requirement(line.split(" --hash")[0]) for line in LINES]
HERE = {canonicalize_name(package.name) for package in distributions()}
(TORCH,) = re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)

PLATFORMS = {  # Linux on x86-64 stands for CPU and CUDA: markers cannot tell them apart, and torch alone differs.
    "linux-x86-64": ("posix", "linux", "Linux", "x86_64"),
    "linux-arm": ("posix", "linux", "Linux", "aarch64"),
    "macos-arm": ("posix", "darwin", "Darwin", "arm64"),
    "windows": ("nt", "win32", "Windows", "AMD64"),
}
PYTHONS = ["3.11.2", "3.11.15", "3.12.10", "3.13.5"]  # the first is Debian 12's


@pytest.fixture(params=PLATFORMS)
def platform(request):
    return dict(
        zip(("os_name", "sys_platform", "platform_system", "platform_machine"), PLATFORMS[request.param], strict=True)
    )


@pytest.fixture(params=PYTHONS)
def environment(request, platform):
    """The values of a platform's markers."""
    version = {"python_full_version": request.param, "python_version": request.param.rpartition(".")[0]}
    return {**default_environment(), **platform, **version, "extra": ""}


def applies(requirement: Requirement, environment: dict, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})


def pins(environment: dict) -> dict[str, list[str]]:
    """Name -> what the lock installs there of it."""
    found = {}
    for requirement in LOCK:
        if applies(requirement, environment):
            (pin,) = requirement.specifier
            found.setdefault(requirement.name, []).append(pin.version)
    return found


@cache
def needs_of(package: str) -> tuple[Requirement, ...]:
    return tuple(map(Requirement, requires(package) or [])) if package in HERE else ()


def test_every_line_is_a_version_with_the_hashes_of_its_files():
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [^;@/]+?)?( --hash=sha256:[0-9a-f]{64})+", line), line[
            :100
        ]
    assert [requirement.name for requirement in LOCK] == sorted(requirement.name for requirement in LOCK)
    assert len(COMMENTS) == 3


def test_torch_is_left_to_the_step_that_chooses_its_build():
    names = {requirement.name for requirement in LOCK}
    assert not {name for name in names if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))}


@pytest.mark.parametrize("page", ["README.md", "docs/install.md"])
def test_pages_name_the_torch_of_the_makefile(page):
    assert set(re.findall(r"torch==(\d[\w.]*)", (ROOT / page).read_text(encoding="utf-8"))) == {TORCH}


def test_every_direct_dependency_has_one_version_within_its_range(environment):
    locked = {**pins(environment), "torch": [TORCH]}
    for requirement in DIRECT:
        assert applies(requirement, environment)
        (version,) = locked[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement.name


def test_nothing_has_two_versions_on_a_platform(environment):
    assert not {name: versions for name, versions in pins(environment).items() if len(versions) > 1}


def test_the_lock_is_closed(environment):
    """Whatever a locked package, or torch, needs on a platform is locked there: pip is told not to look for more."""
    wanted = [(canonicalize_name(need.name), extra) for need in DIRECT for extra in ("", *need.extras)]
    seen = set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        wanted += [
            (canonicalize_name(need.name), needed)
            for need in needs_of(name)
            if applies(need, environment, extra)
            for needed in ("", *need.extras)
        ]
    missing = {name for name, _ in seen} - pins(environment).keys() - {"torch"}
    assert not {name for name in missing if name != "triton" and not name.startswith(("nvidia-", "cuda-"))}


def test_what_packages_need_is_known_here():
    """Else the test above would not say much: but for some of other platforms, all locked packages are installed."""
    assert {requirement.name for requirement in LOCK if applies(requirement, default_environment())} <= HERE


def test_conda_brings_tools_alone_and_no_version_that_the_lock_has():
    needs = [
        Requirement(line.replace("=", "=="))
        for line in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    ]
    python, *tools = needs
    assert python.name == "python" and {tool.name for tool in tools} == {"git", "make", "uv"}
    (version,) = python.specifier
    assert Version(version.version) in SpecifierSet(PROJECT["requires-python"])
    assert version.version in {python.rpartition(".")[0] for python in PYTHONS}
    assert not {tool.name for tool in tools} & {requirement.name for requirement in LOCK}
