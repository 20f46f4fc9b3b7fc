"""Which code a stage reaches: on a small package whose files a test changes one by one, and on this one."""

import json
import re

import pytest

from epsdpo.batch.specs import STAGES, code_digests
from epsdpo.experiment.paths import REPOSITORY
from epsdpo.methods.catalogue import METHODS, code_of, config_class, trainer_class
from epsdpo.runs import reach
from epsdpo.runs.layout import NOTEBOOKS
from epsdpo.runs.reach import CHOOSERS, SIDES, reached, side_of

MODULES = sorted(
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for file in (REPOSITORY / "epsdpo").rglob("*.py")
)

FILES = {
    "a.py": '''
"""What is said of it."""
import math
from epsdpo.methods import shapes, tools as other
from epsdpo.methods.steps import GRID as STEPS

LIMIT = 3
TABLE = {}
TABLE["more"] = 1
SCRIPT = "script.js"


def work(value):
    """What it does."""
    from epsdpo.models.late import helper

    return shapes.area(value) + helper(value) + len(STEPS) + LIMIT + len(TABLE) + math.pi + len(SCRIPT)


def unused():
    return other.anything()
''',
    "script.js": "1",
    "methods/__init__.py": "from epsdpo.data.switches import turn\nturn(on=True)\n",
    "methods/shapes.py": "class Square:\n    side = 1\n    def grow(self):\n        return AREA\n"
    "AREA, PLACE = 2, 3\ndef area(value):\n    return Square()\ndef edge():\n    return 4\n",
    "methods/steps.py": "from epsdpo.world.grid import *\nfrom epsdpo.world.grid import GRID\n",
    "methods/tools.py": "def anything():\n    return 5\n",
    "models/__init__.py": "",
    "models/late.py": "def helper(value):\n    return value.x if value else _deep()\ndef _deep():\n    return 6\n"
    "if __name__ == '__main__':\n    print(7)\n",
    "data/__init__.py": "",
    "data/switches.py": "def turn(on):\n    return on and 8\n",
    "world/__init__.py": "",
    "world/grid.py": "GRID = [9]\nGRID += [10]\n",
    "experiment/__init__.py": "def load():\n    return 11\n",
    "plots/__init__.py": "def save(figure):\n    return 12\n",
}
CELLS = [
    "value: int = 13",
    "from epsdpo import plots\nfrom epsdpo.a import work\nfrom epsdpo.experiment import load\nscale = 14",
    "made = work(load() * scale)  # the work",
    "shown = made + 15\nplots.save(shown)",
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The small package, and a function for what its notebook reaches."""
    monkeypatch.setattr(reach, "PACKAGE", tmp_path / "epsdpo")
    for name, text in FILES.items():
        (tmp_path / "epsdpo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "epsdpo" / name).write_text(text, encoding="utf-8")
    cells = [{"cell_type": "code", "metadata": {}, "source": [cell]} for cell in CELLS]
    cells[0]["metadata"]["tags"] = ["parameters"]
    cells.insert(0, {"cell_type": "code", "metadata": {"tags": ["hosted"]}, "source": ["address = 16"]})
    (tmp_path / "epsdpo" / "work.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return tmp_path / "epsdpo", lambda work="work": reached(tmp_path / "epsdpo" / "work.ipynb", work)


@pytest.mark.parametrize(
    ("file", "old", "new", "in_work", "in_all"),
    [
        ("a.py", "LIMIT = 3", "LIMIT = 33", True, True),
        ("a.py", "What it does", "What else it does", False, False),
        ("a.py", "def unused():", "def more():\n    return 1\n\n\ndef unused():", False, False),
        ("a.py", '["more"] = 1', '["more"] = 2', True, True),
        ("a.py", "GRID as STEPS", "OTHER as STEPS", True, True),
        ("script.js", "1", "2", True, True),  # which a reached statement names
        ("methods/__init__.py", "on=True", "on=False", True, True),  # done on import
        ("data/switches.py", "on and 8", "on and 88", True, True),  # by what is done on import
        ("methods/shapes.py", "PLACE = 2, 3", "PLACE = 22, 3", True, True),  # by a method of a class that is reached
        ("methods/shapes.py", "return 4", "return 44", False, False),
        ("methods/tools.py", "return 5", "return 55", False, False),
        ("models/late.py", "return 6", "return 66", True, True),  # imported where it is called
        ("models/late.py", "print(7)", "print(77)", False, False),
        ("world/grid.py", "[9]", "[99]", True, True),  # by way of another module
        ("world/grid.py", "+= [10]", "+= [100]", True, True),
        ("experiment/__init__.py", "return 11", "return 111", False, False),  # it reads settings, which count by value
        ("plots/__init__.py", "return 12", "return 122", False, True),
        ("work.ipynb", "int = 13", "int = 133", False, False),
        ("work.ipynb", "address = 16", "address = 166", False, False),
        ("work.ipynb", "scale = 14", "scale = 144", True, True),
        ("work.ipynb", "# the work", "# the one call", False, False),
        ("work.ipynb", "made + 15", "made + 155", False, True),
    ],
)
def test_what_is_reached_by_name_counts(package, file, old, new, in_work, in_all):
    folder, reach_from = package
    before = reach_from(), reach_from("")
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    assert (reach_from() != before[0], reach_from("") != before[1]) == (in_work, in_all)


def test_a_notebook_without_the_work_counts_as_a_whole(package):
    assert package[1]("train") == package[1]("")


def test_every_module_stands_on_one_side():
    rooms = {".".join(module.split(".")[:2]) for module in MODULES if module != "epsdpo"}
    assert rooms <= set(SIDES)
    assert set(SIDES) <= set(MODULES)
    assert not side_of("epsdpo.train.memory.advice") and side_of("epsdpo.train.preferences")
    for module, name in CHOOSERS:
        assert re.search(rf"^(def {name}\(|{name}\b.* = )", (source_of(module)), re.MULTILINE), (module, name)


def source_of(module):
    place = REPOSITORY.joinpath(*module.split("."))
    file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    return file.read_text(encoding="utf-8")


def test_nothing_that_counts_is_imported_by_way_of_the_face():
    """Which finds its names by a rule of its own, that nobody follows here."""
    rooms = {module.split(".")[1] for module in MODULES if module != "epsdpo"}
    texts = [source_of(module) for module in MODULES if side_of(module)]
    texts += ["\n".join(reach._code_cells(notebook)) for notebook in NOTEBOOKS.glob("*.ipynb")]
    for text in texts:
        for names in re.findall(r"^\s*from epsdpo import (.*)$", text, re.MULTILINE):
            assert {name.split()[0] for name in names.split(",")} <= rooms, names


def test_the_work_of_each_stage_is_called_in_its_notebook():
    for spec in STAGES.values():
        assert re.search(rf"\b{spec.work}\(", "\n".join(reach._code_cells(NOTEBOOKS / spec.notebook)))


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_made_of_is_found_without_loading_it(method):
    made_of = [(config_class(method).__module__, config_class(method).__name__)]
    assert code_of(method) == [*made_of, (trainer_class(method).__module__, trainer_class(method).__name__)]


def test_a_training_reaches_its_own_method_and_not_the_others():
    def modules(method):
        return set(code_digests("train", NOTEBOOKS / STAGES["train"].notebook, method))

    own = {"beta_dpo": "epsdpo.methods.beta_dpo", "kto": "epsdpo.methods.kto"}
    for method, module in own.items():
        assert module in modules(method) and not modules(method) & (set(own.values()) - {module})
    assert not modules("epsilon_dpo") & set(own.values())
    drawing = re.compile(r"epsdpo\.(plots|trajectory|report|evaluation|paper)\b")
    assert not [module for module in modules("epsilon_dpo") if drawing.match(module)]


def test_a_report_reaches_no_torch(monkeypatch):
    monkeypatch.setattr(reach, "digest", lambda content: content)
    code = code_digests("report", NOTEBOOKS / STAGES["report"].notebook)
    assert "pd = pandas" in code["epsdpo.report.collect"]
    assert not [module for module, text in code.items() if re.search(r"^torch = |= torch\.", text, re.MULTILINE)]
