"""Which of this package's code a stage can reach, definition by definition, and a digest of it.

A definition (a function, a class, an assignment) counts if it is reached by name from where a stage begins: what a
function names it may call, what a class names any of its methods may call. So a function that nobody calls, or a method
of training that another experiment has, makes nothing due, and a constant that is read somewhere below does. Statements
that do something when their module is imported count with any import of it. Comments, docstrings and layout do not
count.

Seen are names, not values. What is found by a computed name is not seen; methods' trainers are found so, and are given
as further beginnings. Nor is what one statement of a notebook does to an object that another made, unless it assigns to
it; nor what an experiment says of itself beyond its settings, such as whether β follows the decisions.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from epsdpo.runs.statements import Imports, Module, Statement, parsed

KEY_LENGTH = 16  # hexadecimal digits
PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGE_NAME = "epsdpo"

# Which rooms and modules decide what comes out of a stage; the longest beginning counts. They do not if they start,
# place, watch or describe a run, or read settings, which a key covers as values.
SIDES = {
    "epsdpo.__main__": False,
    "epsdpo.batch": False,
    "epsdpo.data": True,
    "epsdpo.evaluation": True,
    "epsdpo.experiment": False,
    "epsdpo.files": True,
    "epsdpo.methods": True,
    "epsdpo.models": True,
    "epsdpo.paper": True,
    "epsdpo.plots": True,
    "epsdpo.report": True,
    "epsdpo.runs": False,
    "epsdpo.train": True,
    "epsdpo.train.__main__": False,
    "epsdpo.train.launch": False,
    "epsdpo.train.live": False,
    "epsdpo.train.memory": False,
    "epsdpo.train.pace": False,
    "epsdpo.train.progress_lines": False,
    "epsdpo.trajectory": True,
    "epsdpo.world": True,
}
DRAWING = "epsdpo.plots"

# They find a method's config and trainer by its name, and what they find counts instead.
CHOOSERS = {
    ("epsdpo.methods.catalogue", "CATALOGUE"),
    ("epsdpo.methods.catalogue", "config_class"),
    ("epsdpo.methods.catalogue", "trainer_class"),
}

_ALL, _EFFECTS = "*", ""  # in place of a definition's name: all of them, and what an import of the module does


def side_of(module: str) -> bool:
    """Whether a module has a part in what comes out of a stage; what is in no room of `SIDES` is taken to."""
    if module == _PACKAGE_NAME:
        return False  # the face: lazy imports alone
    while module not in SIDES and "." in module:
        module = module.rpartition(".")[0]
    return SIDES.get(module, True)


def reached(
    notebook: Path, work: str = "", also: Iterable[tuple[str, str]] = (), passed_over: str = ""
) -> dict[str, str]:
    """Digests of the code that a notebook reaches, its own and that of each module.

    Args:
        work: name of the function whose call counts, with all that it is given; the rest of the notebook only shows
            what came of it. Without one, or where the notebook does not name it, every code cell counts.
        also: further beginnings, as module and name.
        passed_over: a room more that does not count.
    """
    own = parsed("\n".join(_code_cells(notebook)))
    walk = _Walk(notebook.name, own, passed_over)
    calls = [one for one in own.statements() if (work, None) in one.uses]
    for statement in calls or own.statements():
        walk.take(notebook.name, statement)
    walk.go([*also, *([] if calls else _imported(own.imports))])
    return {place: digest("\n".join(code for _, code in sorted(found))) for place, found in sorted(walk.found.items())}


def digest(content: str | bytes) -> str:
    content = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(content).hexdigest()[:KEY_LENGTH]


class _Walk:
    """Collects the code that is reached, by the module that it stands in."""

    def __init__(self, notebook: str, own: Module, passed_over: str):
        self.found: dict[str, set[tuple[int, str]]] = defaultdict(set)  # lines, for their order alone
        self._notebook, self._passed_over = notebook, passed_over
        self._modules: dict[str, Module | None] = {notebook: own}
        self._seen = set(CHOOSERS)
        self._pending: list[tuple[str, str]] = []

    def go(self, begins: Iterable[tuple[str, str]]) -> None:
        self._pending += begins
        while self._pending:
            place, name = self._pending.pop()
            module = self._module(place)
            if module is not None and (place, name) not in self._seen:
                self._seen.add((place, name))
                self._visit(place, name, module)

    def take(self, place: str, statement: Statement) -> None:
        """A statement of a module, with all that it names."""
        self.found[place].add((statement.line, statement.code))
        module = self._module(place)
        for file in _files_beside(place, statement.file_names):
            self.found[place].add((0, f"{file.name}: {digest(file.read_bytes())}"))
        self._pending += _imported(statement.imports)
        for name, attribute in statement.uses:
            for imports in (statement.imports, module.imports):
                if name in imports:
                    self._follow(place, name, imports[name], attribute)
            if name in module.definitions:
                self._pending.append((place, name))

    def _visit(self, place: str, name: str, module: Module) -> None:
        if name == _EFFECTS:
            for statement in module.effects:
                self.take(place, statement)
            self._pending += [(place.rpartition(".")[0], _EFFECTS), *_imported(module.imports)]
            return
        if place != self._notebook:
            self._pending.append((place, _EFFECTS))
        if name == _ALL:
            self._pending += [(place, each) for each in [*module.definitions, *module.imports]]
        elif name in module.definitions:
            for statement in module.definitions[name]:
                self.take(place, statement)
        elif name in module.imports:
            self._follow(place, name, module.imports[name], None)
        elif _file_of(f"{place}.{name}") is not None:
            self._pending.append((f"{place}.{name}", _ALL))
        elif not name.startswith("__"):
            self._pending.append((place, _ALL))  # by `__getattr__`, or not to be told how

    def _follow(self, place: str, alias: str, source: tuple[str, str | None], attribute: str | None) -> None:
        """A name that was imported."""
        module, name = source
        inner = module if name is None else f"{module}.{name}"
        is_module = name is None or _file_of(inner) is not None
        if module.split(".")[0] == _PACKAGE_NAME and self._module(inner if is_module else module) is None:
            return  # passed over
        self.found[place].add((0, f"{alias} = {inner}"))
        self._pending.append((inner, attribute or _ALL) if is_module else (module, name))

    def _module(self, name: str) -> Module | None:
        """A module of this package that counts."""
        if name not in self._modules:
            file = _file_of(name)
            passed_over = self._passed_over and f"{name}.".startswith(f"{self._passed_over}.")
            counts = file is not None and side_of(name) and not passed_over
            self._modules[name] = parsed(file.read_text(encoding="utf-8")) if counts else None
        return self._modules[name]


def _imported(imports: Imports) -> list[tuple[str, str]]:
    """The modules behind imports, as far as what happens when they are imported."""
    sources = [name for source in imports.values() for name in (source[0], ".".join(filter(None, source)))]
    return [(name, _EFFECTS) for name in sources]


def _file_of(module: str) -> Path | None:
    root, *parts = module.split(".")
    if root != _PACKAGE_NAME:
        return None
    place = PACKAGE.joinpath(*parts)
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _files_beside(module: str, names: Iterable[str]) -> list[Path]:
    """Files in a module's folder that it names, which it reads."""
    own = _file_of(module)
    return [] if own is None else [file for name in names if (file := own.with_name(name)).is_file()]


def _code_cells(notebook: Path) -> Iterator[str]:
    """The code cells but for the parameters, whose values are settings and paths, and the installation on Colab."""
    # As JSON, since loading nbformat takes longer than all else that an idle batch does.
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and not {"parameters", "hosted"} & set(cell["metadata"].get("tags", [])):
            yield "".join(cell["source"])
