"""The vectors: tiny models, a dozen pairs, and what the paper's equations make of them, read from `training.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TRAINING, CRITERION = (Path(__file__).with_name(name) for name in ("training.json", "criterion.json"))
PADDING, END = "<pad>", "<eos>"


def read_vectors(path: Path = TRAINING) -> dict[str, Any]:
    """A file of vectors, whose fields docs/conformance.md explains."""
    return json.loads(path.read_text(encoding="utf-8"))


def tokenizer_of(vectors: dict[str, Any]) -> PreTrainedTokenizerFast:
    """One token for each word between spaces."""
    numbers = {token: number for number, token in enumerate(vectors["vocabulary"])}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=PADDING))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PADDING, eos_token=END)


def model_of(vectors: dict[str, Any], role: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model that is "policy" or "reference". Its weights are exact in every dtype from bfloat16 up."""
    model = LlamaForCausalLM(LlamaConfig(**vectors["model"])).to(dtype)
    if role is not None:
        model.load_state_dict({name: torch.tensor(weight, dtype=dtype) for name, weight in vectors[role].items()})
    return model.eval()
