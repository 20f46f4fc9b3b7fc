"""The house: its rooms, that imports run one way through them, and that no two modules have one name."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "epsdpo"

# From the ground up: each room may use those before it.
ROOMS = (
    "files",
    "methods",
    "experiment",
    "runs",
    "world",
    "models",
    "data",
    "plots",
    "train",
    "evaluation",
    "trajectory",
    "report",
    "paper",
    "batch",
    "__main__",
)
FACE = {
    "methods",
    "runs",
    "batch",
}  # what `epsdpo/__init__.py` may reach: the library, and what a command sees to first


def _name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def _imports(module: str) -> set[str]:
    """The package's modules that a module imports, at its head or anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports relative to itself; write the whole name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in MODULES}


IMPORTS = {module: _imports(module) for module in MODULES}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_entry_is_a_room():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")}
    assert entries == {"__init__", *ROOMS} and len(entries) <= 16


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_runs_up(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    upward = {
        (module, used)
        for module in MODULES
        if _room(module) == room
        for used in IMPORTS[module]
        if _room(used) in above
    }
    assert not upward


def test_the_face_is_the_library():
    assert {_room(module) for module in IMPORTS["epsdpo"]} <= FACE
    assert not {module for module, used in IMPORTS.items() if "epsdpo" in used} - {
        "epsdpo.__main__",
        "epsdpo.runs.manifest",
    }


def test_no_import_runs_in_a_circle():
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as circle:
        pytest.fail(" → ".join(circle.args[1]))


def test_no_two_modules_share_a_name_by_accident():
    """On purpose: a config's section and a stage's figures bear its name, and each study of the paper has a drawing."""
    on_purpose = ("epsdpo.experiment.sections.", "epsdpo.plots.")
    names = Counter(
        module.rpartition(".")[2] for module in MODULES if "." in module and not module.startswith(on_purpose)
    )
    assert not {name: count for name, count in names.items() if count > 1 and name not in ("__main__", "drawing")}
