"""What a config names on this machine: folders of models, and files. What cannot work is found before anything runs.

Of a model it looks at names, config.json and tokenizer, and reads no weights; a GGUF file is converted, once. A hub id
is left to the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from epsdpo.experiment import ON_POLICY, WORLD, ConfigError, Experiment
from epsdpo.experiment.gguf_file import GgufError, content_of, is_gguf
from epsdpo.experiment.paths import looks_local
from epsdpo.files import read_text
from epsdpo.methods.loading import OwnCodeError, read_config, read_tokenizer
from epsdpo.models.gguf import as_folder, weights_in_words
from epsdpo.models.own_code import require_no_own_code

NOT_HERE = "no such file or folder, seen from {}. Check the path; a hub id has the form owner/name"

_FILES = (".json", ".jsonl", ".gz", ".parquet", ".arrow", ".jinja", ".txt")  # endings that no hub id has
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of several such files
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
_LFS_POINTER = b"version https://git-lfs"


def require_local(experiment: Experiment) -> None:
    """Refuse an experiment that names what is not here, a folder without a model, or one that needs code of its own.

    Raises:
        ConfigError: with a line for each problem: key, value and remedy.
    """
    require_no_own_code([experiment])
    if problems := list(local_problems(experiment)):
        raise ConfigError("\n".join(problems))


def local_problems(experiment: Experiment) -> Iterator[str]:
    """In a line each, what is wrong with the local paths of a config."""
    for key, name in _paths(experiment):
        if (looks_local(name) or name.endswith(_FILES)) and not Path(name).expanduser().exists():
            yield f"{key} is {name!r}: {NOT_HERE.format(Path.cwd())}"
    for key, name, revision in _models(experiment):
        if name.startswith("~") and Path(name).expanduser().exists():
            yield f"{key} is {name!r}, which is not expanded. Write {str(Path(name).expanduser())!r}"
        elif is_gguf(name):
            yield from _gguf_problems(key, name, revision)
        elif Path(name).exists() and (problem := folder_problem(Path(name))):
            yield f"{key} is {name!r}: {problem}"


def folder_problem(folder: Path) -> str | None:
    """Why a folder is no model with its tokenizer, and what to do; None if it looks like one."""
    if not folder.is_dir():
        return f"it is a file. Name the folder that holds {_CONFIG}, the weights and the tokenizer"
    if not (folder / _CONFIG).exists():
        if (folder / _ADAPTER).exists():
            return (
                f"it holds an adapter of {_base_model(folder)!r}, and no model. Merge it first (PEFT's "
                "merge_and_unload, then save_pretrained, with the tokenizer), or name its base model"
            )
        return f"it holds no {_CONFIG}. Name the folder of a model as save_pretrained writes it"
    return _config_problem(folder) or _weights_problem(folder) or _tokenizer_problem(folder)


def _paths(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(key, value) of everything that may be a path, but for `data.source`, which preparation looks at first."""
    yield from ((key, name) for key, name, _ in _models(experiment))
    template = experiment.model.chat_template
    if template is not None:
        yield "model.chat_template", template if template.endswith(".jinja") else template.partition("@")[0]
    prompts = [("evaluate.prompts", experiment.evaluate and experiment.evaluate.prompts)]
    if experiment.data.source == ON_POLICY:
        prompts.append(("data.on_policy.prompts", experiment.data.on_policy.prompts))
    for key, section in prompts:
        if section is not None and section.source != WORLD:
            yield f"{key}.source", section.source
    evaluate = experiment.evaluate
    if evaluate is None:
        return
    files = {"judge.template": evaluate.judge and evaluate.judge.template}
    for name in ("annotations", "outputs", "reference_outputs"):
        files[f"calibrate_with.{name}"] = evaluate.calibrate_with and getattr(evaluate.calibrate_with, name)
    yield from ((f"evaluate.{key}", name) for key, name in files.items() if name is not None)


def _models(experiment: Experiment) -> Iterator[tuple[str, str, str | None]]:
    """(key, value, revision) of every model that is loaded here."""
    if experiment.model.name_or_path != WORLD:
        yield "model.name_or_path", experiment.model.name_or_path, experiment.model.revision
    on_policy, judge = experiment.data.on_policy, experiment.evaluate and experiment.evaluate.judge
    if on_policy is not None and on_policy.ranker.model != WORLD:
        yield "data.on_policy.ranker.model", on_policy.ranker.model, on_policy.ranker.revision
    if judge is not None and judge.kind not in ("gold", "chat"):
        yield "evaluate.judge.model", judge.model, judge.revision


def gguf_facts(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Of each GGUF file that a config names and that is here, by its key: where it lies, its content, and how it holds
    its weights."""
    return {
        key: {"file": name, "content": content_of(name), "weights": weights_in_words(name)}
        for key, name, revision in _models(experiment)
        if is_gguf(name) and Path(name).is_file() and revision in (None, content_of(name))
    }


def _gguf_problems(key: str, name: str, revision: str | None) -> Iterator[str]:
    if Path(name).exists():
        try:
            as_folder(name, revision)
        except GgufError as error:
            yield f"{key}: {error}"


def _config_problem(folder: Path) -> str | None:
    try:
        content = json.loads(read_text(folder / _CONFIG))
        if not isinstance(content, dict):
            return f"its {_CONFIG} is {type(content).__name__}, and no object. Fetch or write it again"
        read_config(folder, local_files_only=True)
    except OwnCodeError:  # which `require_no_own_code` tells
        return None
    except Exception as error:  # whatever the checks of an architecture's own config raise
        said = " ".join(str(error).split())
        return f"its {_CONFIG} cannot be used ({type(error).__name__}: {said[:300]}). Fetch or write it again"
    return None


def _weights_problem(folder: Path) -> str | None:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            files = [name]
        elif index.exists():
            try:
                files = sorted(set(json.loads(read_text(index))["weight_map"].values()))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                return f"its {index.name} cannot be read ({type(error).__name__}: {error}). Fetch it again"
        else:
            continue
        for file in files:
            if not (folder / file).is_file():
                return f"its weights lack the file {file}, which {index.name} names. Fetch it too"
            with (folder / file).open("rb") as content:
                start = content.read(len(_LFS_POINTER))
            if start == _LFS_POINTER or not start:
                what = "is a Git LFS pointer" if start else "is empty"
                return f"its file {file} {what} and no weights. Fetch it whole, e.g. by `git lfs pull`"
        return None
    return f"it holds no weights ({' or '.join(_WEIGHTS)}, or an index of several). Fetch them too"


def _tokenizer_problem(folder: Path) -> str | None:
    remedy = "Put the model's tokenizer there (tokenizer.save_pretrained)"
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        return f"it holds no tokenizer ({', '.join(_TOKENIZERS)}). {remedy}"
    try:
        read_tokenizer(folder, local_files_only=True)
    except OwnCodeError:
        return None
    except Exception as error:  # whatever the tokenizers library raises, which has a type for hardly anything
        said = " ".join(str(error).split())
        return f"its tokenizer cannot be loaded ({type(error).__name__}: {said[:300]}). {remedy}"
    return None


def _base_model(folder: Path) -> str:
    try:
        return str(json.loads(read_text(folder / _ADAPTER))["base_model_name_or_path"])
    except (OSError, ValueError, LookupError, TypeError):
        return "a model that it does not name"
