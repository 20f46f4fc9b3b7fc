"""A model in a GGUF file, as a folder that is loaded like any other: dequantised to float32, with its own tokenizer.

transformers reads such files, but neither trains nor saves what it has read. So each is converted once and kept by its
content.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import filelock

from epsdpo.experiment.gguf_file import GgufError, content_of, is_gguf
from epsdpo.methods.loading import load_causal_lm, read_tokenizer
from epsdpo.runs.derived import cache_dir, derived_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "gguf.json"  # in the folder: how the file held its weights

_MAGIC = b"GGUF"
_BYTES_PER_WEIGHT = 4
_FETCH = "Fetch or write it again"
_ROOM = "Make room there, or set EPSDPO_CACHE to a folder that has it"
_WHOLE = ("F64", "F32", "F16", "BF16")  # kinds of weights that are not quantised
# Names in such files for GPT-2's way of taking a text apart before byte-level BPE. Older files name none.
_AS_GPT_2 = ("gpt-2", "phi-2", "mpt", "olmo")
_NONE_NAMED = "default"

_known: dict[str, Path] = {}  # by content; whether a folder is as it was left is looked at once in a process


class _Header(NamedTuple):
    """Shares of the kinds of weights, the largest first; how many there are; and how texts are taken apart."""

    shares: dict[str, float]
    weights: int
    split: str


def as_folder(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Where a model is loaded from, and its revision: the folder that a GGUF file comes to, any other as it is named.

    Converting takes a few seconds or a minute, once, and four bytes on the disk for each weight.

    Raises:
        GgufError: if the file is not there, is not the one that `revision` stands for, or cannot be converted.
    """
    if not is_gguf(source):
        return source, revision
    content = content_of(source, revision)
    folder = _known.get(content)
    if folder is None or not folder.is_dir():
        folder = _known[content] = _folder_of(source, content)
    return str(folder), None


def weights_in_words(source: str) -> str:
    """How a GGUF file holds its weights, such as "4-bit weights (Q4_1 79 %, Q8_0 21 %), dequantised"."""
    folder, _ = as_folder(source)
    shares: dict[str, float] = json.loads((Path(folder) / WEIGHTS_FILE).read_text(encoding="utf-8"))
    mixture = ", ".join(f"{name} {share:.0%}".replace("%", " %") for name, share in shares.items() if share >= 0.005)
    most = max(shares, key=lambda name: shares[name])
    if most in _WHOLE:
        return f"weights as in the file ({mixture})"
    bits = re.search(r"(?:Q|FP)(\d)", most)
    return f"{f'{bits[1]}-bit' if bits else 'quantised'} weights ({mixture}), dequantised"


def _folder_of(source: str, content: str) -> Path:
    import torch
    import transformers
    from safetensors import SafetensorError

    decided_by = {
        "content": content,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": [torch.__version__, transformers.__version__],
    }
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        # Whoever else asks for the same file waits: a conversion takes the memory of the whole model.
        with filelock.FileLock(cache_dir() / f"gguf-{content.removeprefix('sha256:')[:16]}.lock"):
            return derived_folder("gguf", decided_by, lambda folder: _convert(source, folder))
    except (OSError, SafetensorError) as error:
        raise GgufError(
            f"{source!r} cannot be kept in {cache_dir()}: {' '.join(str(error).split())}. {_ROOM}"
        ) from error


def _convert(source: str, folder: Path) -> None:
    header = _read_header(source)
    needed, free = header.weights * _BYTES_PER_WEIGHT, shutil.disk_usage(folder).free
    if needed > free:
        raise GgufError(
            f"{source!r}: its {header.weights:,} weights take {needed / 1e9:.1f} GB as float32, and {cache_dir()} has "
            f"{free / 1e9:.1f} GB left. {_ROOM}"
        )
    logger.info("converting the %s weights of %s to float32, once for all runs", f"{header.weights:,}", source)
    # By a link in a folder of its own: what else lies beside the file is not part of it.
    with tempfile.TemporaryDirectory(dir=folder.parent) as alone:
        (Path(alone) / "model.gguf").symlink_to(Path(source).resolve())
        try:
            model, tokenizer = _read(alone, "model.gguf")
        except Exception as error:  # of many kinds: a file can say anything of its architecture
            said = " ".join(str(error).split())[:300]
            raise GgufError(
                f"{source!r}: transformers cannot read it ({type(error).__name__}: {said}). Name a GGUF file of an "
                "architecture and a tokenizer that it knows, or the model as a folder that save_pretrained wrote"
            ) from error
    _unquantised(model).save_pretrained(folder)
    _split_as_said(source, header.split, tokenizer)
    tokenizer.save_pretrained(folder)
    (folder / WEIGHTS_FILE).write_text(json.dumps(header.shares), encoding="utf-8")


def _read_header(source: str) -> _Header:
    """What is to be known of a file before it is converted.

    Raises:
        GgufError: if it is no whole GGUF file, or the package that reads it is missing.
    """
    with Path(source).open("rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        what = "is empty" if not start else "is a Git LFS pointer" if start == b"vers" else f"begins with {start!r}"
        raise GgufError(f"{source!r} {what}, and a GGUF file begins with {_MAGIC!r}. {_FETCH}")
    if importlib.util.find_spec("gguf") is None:
        raise GgufError(
            f"{source!r}: the package gguf, which reads such files, is not installed. It belongs to the extra `kit`: "
            "pip install gguf"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(source)
        split = reader.get_field("tokenizer.ggml.pre")
        said = _NONE_NAMED if split is None else split.contents()
    except Exception as error:  # whatever NumPy says of bytes that are not there
        reason = " ".join(str(error).split())[:200]
        raise GgufError(f"{source!r} is cut off or damaged ({type(error).__name__}: {reason}). {_FETCH}") from error
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    if not counts:
        raise GgufError(f"{source!r} holds no weights. {_FETCH}")
    total = counts.total()
    return _Header({name: count / total for name, count in counts.most_common()}, total, said)


def _read(folder: str, file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    model, loading = load_causal_lm(folder, gguf_file=file, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"it has no {', '.join(missing[:3])}, which would be random")
    return model, read_tokenizer(folder, gguf_file=file)


def _unquantised(model: PreTrainedModel) -> PreTrainedModel:
    """A fresh model with the same weights, of which transformers does not know that they were quantised."""
    import torch

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.generation_config = model.generation_config
    return fresh


def _split_as_said(source: str, said: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a byte-level tokenizer take texts apart as the file says, where transformers does it as GPT-2."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if said in _AS_GPT_2 or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if said == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    else:
        logger.warning(
            "%s: its tokenizer is said to take texts apart as %r, which is not known here; they are as GPT-2 does, so "
            "that some tokens may differ",
            source,
            said,
        )
