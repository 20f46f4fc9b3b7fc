"""What the result of a stage depends on, as one short key.

Two runs of a stage with equal keys would compute the same thing: the key covers the settings that the stage uses, the
code of its notebook and of the library below it, and the keys of its inputs. It does not cover comments, whitespace,
docstrings, prose, paths, times, or where and in how many processes a run is computed. This module reads sources and
makes keys; when a stage is due is decided in `epsdpo.batch.plan`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from epsdpo.experiment import Experiment
from epsdpo.experiment.schema import ABOUT_EARLIER_PARTS
from epsdpo.experiment.sections.server import ACCESS

PACKAGE = Path(__file__).resolve().parents[1]
KEY_LENGTH = 16  # hexadecimal digits

# They start, place and watch a run, and have no part in what comes out of it. The package's own module imports lazily.
_NEVER_DECISIVE = tuple(
    f"epsdpo{module}"
    for module in (
        "",
        ".by_hand",
        ".keys",
        ".launch",
        ".live",
        ".manifest",
        ".memory",
        ".paths",
        ".progress_lines",
        ".run_folder",
        ".stages",
        ".watch",
    )
)
# A new figure must not cost a new training.
_FIGURES = "epsdpo.plots"
_FIGURES_ARE_NO_RESULT = ("sample", "prepare", "sft", "train")

# They decide how soon and at what price an answer comes, and not what it says.
_NEVER_DECISIVE_KEYS = {
    "evaluate": ("batch_size",),
    "server": (*ACCESS, "reference_url"),
    "judge": (*ACCESS, "input_price", "output_price", "batch_size"),
}


def settings_of(stage: str, experiment: Experiment) -> dict[str, Any]:
    """The part of an experiment that decides what comes out of its `stage`; the rest can change without it."""
    values = experiment.model_dump(exclude={"train": set(ABOUT_EARLIER_PARTS)})
    data, model = values["data"], values["model"]
    if server := (data["on_policy"] or {}).get("server"):
        decisive = {key: value for key, value in server.items() if key not in _NEVER_DECISIVE_KEYS["server"]}
        data["on_policy"]["server"] = decisive
    tokenizer = {name: model[name] for name in ("name_or_path", "revision", "chat_template")}
    start = {**tokenizer, "dtype": model["dtype"], "attn_implementation": model["attn_implementation"]}
    if stage == "sample":
        world = {"world": data["world"]} if experiment.data.speaks_world else {}
        return {
            "on_policy": data["on_policy"],
            "model": start,
            "max_prompt_length": data["max_prompt_length"],
            "template_date": data["template_date"],
            **world,
        }
    if stage == "prepare":
        # Pairs that were sampled are those of the model as it was loaded.
        whose = tokenizer if data["on_policy"] is None else start
        return {"data": data, "model": whose, "max_length": experiment.train["max_length"]}
    if stage == "sft":
        on_cpu = {"use_cpu": experiment.train.get("use_cpu", False)}
        return {**settings_of("prepare", experiment), "model": start, "sft": model["sft"], **on_cpu}
    sections = {"train": ("method", "seed", "model", "train"), "evaluate": ("title", "seed", "evaluate")}[stage]
    settings = {section: values[section] for section in sections}
    if settings.get("evaluate") is not None:
        settings["evaluate"] = _decisive(settings["evaluate"])
    return settings


def _decisive(evaluate: dict[str, Any]) -> dict[str, Any]:
    """The `evaluate` section without what changes no answer, and with the judge's template as what it says."""
    sections = {"evaluate": evaluate, **{name: evaluate[name] for name in ("server", "judge")}}
    kept = {
        name: {key: value for key, value in section.items() if key not in _NEVER_DECISIVE_KEYS[name]}
        for name, section in sections.items()
        if section is not None
    }
    template = Path((evaluate["judge"] or {}).get("template") or "")
    if template.is_file():  # one that is not there is refused when the judge is loaded
        kept["judge"]["template"] = hashlib.sha256(template.read_bytes()).hexdigest()[:KEY_LENGTH]
    return kept.pop("evaluate") | kept


def key_parts(settings: dict[str, Any], code: dict[str, str], inputs: Mapping[str, str]) -> dict[str, dict]:
    """Everything that the key of a stage covers, by name, so that two keys can be told apart in words.

    Args:
        settings: the part of the experiment that the stage uses, as nested keys and values.
        code: of the stage, see `code_digests`.
        inputs: keys of the stages whose results it reads, by role.
    """
    return {"settings": _flatten(settings), "code": code, "inputs": dict(inputs)}


def key_of(parts: Mapping[str, Any]) -> str:
    return _digest(json.dumps(parts, sort_keys=True, ensure_ascii=False))


def differences(old: Mapping[str, dict], new: Mapping[str, dict]) -> list[str]:
    """In words, what changed between the parts of two keys; empty if nothing did."""
    reasons = []
    for kind in new:
        before, after = old.get(kind, {}), new[kind]
        for name in {**before, **after}:
            if before.get(name) == after.get(name) and (name in before) == (name in after):
                continue
            if kind == "settings":
                reasons.append(f"{name} was {before.get(name, 'not set')!r}, is {after.get(name, 'not set')!r}")
            elif kind == "code":
                reasons.append(f"{name} changed" if name in before and name in after else f"{name} came or went")
            else:
                reasons.append(f"its input {name} changed")
    return reasons


def code_digests(stage: str, notebook: Path) -> dict[str, str]:
    """Digests of the notebook's code and of each module of this package that it reaches by imports."""
    code = _notebook_code(notebook)
    digests = {notebook.name: _digest(_meaning(ast.parse(code)))}
    pending = sorted(_imported_modules(ast.parse(code)))
    while pending:
        module = pending.pop()
        file = _file_of(module)
        if file is None or module in digests or module in _NEVER_DECISIVE:
            continue
        if stage in _FIGURES_ARE_NO_RESULT and f"{module}.".startswith(f"{_FIGURES}."):
            continue
        digest, imports = _module_digest(file, file.stat().st_mtime_ns)
        digests[module] = digest
        pending += imports
    return dict(sorted(digests.items()))


def _notebook_code(notebook: Path) -> str:
    """The code cells but for the parameters, whose values are settings and paths."""
    # As JSON, since loading nbformat takes longer than all else that an idle batch does.
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n".join(
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", [])
    )


@functools.cache
def _module_digest(file: Path, modified: int) -> tuple[str, list[str]]:
    """Digest and imports of a module as it was `modified`; five stages ask for much the same modules."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return _digest(_meaning(tree)), sorted(_imported_modules(tree))


def _imported_modules(tree: ast.AST) -> Iterator[str]:
    """Names under which this package's modules are imported, at any depth; some may name things inside a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "epsdpo")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "epsdpo":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path | None:
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _meaning(tree: ast.Module) -> str:
    """The code without comments, whitespace and docstrings."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:]
    return ast.dump(tree)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
