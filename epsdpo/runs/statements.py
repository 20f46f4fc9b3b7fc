"""The statements at the top of a module, each with what it defines and what it names."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

Imports = dict[str, tuple[str, str | None]]  # alias -> module, and the name in it, None for the module itself

_NOT_ON_IMPORT = ("TYPE_CHECKING", "__name__ == '__main__'")
_FILE_NAME = re.compile(r"[\w-]+\.\w+")
_DEFINING = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)


@dataclass
class Statement:
    """What a statement at the top of a module says, at any depth.

    Attributes:
        code: without comments, whitespace and docstrings.
        uses: names, each with the attribute that is asked of it, or None where it stands by itself.
        imports: what it imports for itself.
        file_names: texts that may name files.
    """

    line: int
    code: str
    uses: set[tuple[str, str | None]]
    imports: Imports
    file_names: set[str]


@dataclass
class Module:
    """The definitions of a module by name, the statements that do more than define, and what is imported at the top."""

    definitions: dict[str, list[Statement]] = field(default_factory=lambda: defaultdict(list))
    effects: list[Statement] = field(default_factory=list)
    imports: Imports = field(default_factory=dict)

    def statements(self) -> list[Statement]:
        return [*self.effects, *itertools.chain(*self.definitions.values())]


@functools.cache
def parsed(text: str) -> Module:
    """The statements of a module; the stages of a batch ask for much the same ones."""
    module = Module()
    for statement in ast.parse(text).body:
        imports = _imports(statement)
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module.imports |= imports
            continue
        if isinstance(statement, ast.If) and ast.unparse(statement.test) in _NOT_ON_IMPORT:
            continue
        if _is_text(statement):
            continue
        taken = Statement(statement.lineno, _meaning(statement), set(_uses(statement)), imports, _file_names(statement))
        bound = _bound(statement)
        for name in bound:
            module.definitions[name].append(taken)
        if not isinstance(statement, _DEFINING) or not bound or not bound.isdisjoint(module.imports):
            module.effects.append(taken)
    return module


def _imports(tree: ast.AST) -> Imports:
    found: Imports = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0]: (alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found


def _uses(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    of_attributes = set()
    for node in ast.walk(tree):  # what holds a node comes before it
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            of_attributes.add(node.value)
            yield node.value.id, node.attr
        elif isinstance(node, ast.Name) and node not in of_attributes:
            yield node.id, None


def _file_names(tree: ast.AST) -> set[str]:
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {text for text in texts if _FILE_NAME.fullmatch(text)}


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a statement defines, or whose value it changes by an assignment to a part of it."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names = set() if isinstance(statement, _DEFINING) else set(_imports(statement))
    for node in ast.walk(statement):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            while not isinstance(node, ast.Name) and hasattr(node, "value"):
                node = node.value
            names |= {node.id} if isinstance(node, ast.Name) else set()
    return names


def _meaning(tree: ast.AST) -> str:
    """The code without comments, whitespace and docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:]
    return ast.dump(tree)


def _is_text(statement: ast.AST) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)
