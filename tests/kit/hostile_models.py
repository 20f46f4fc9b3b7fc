"""Model folders with Python of their own, which leaves a mark when it is run."""

import json
import shutil
from pathlib import Path

from kit.official import OFFICIAL

_CODE = """
with open({mark!r}, "a") as file:
    file.write(__name__ + "\\n")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(*positional, **named):
    raise RuntimeError
"""
_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


def _all_of_it(config, tokenizer, place):
    """As hub repositories with a model of their own are laid out."""
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", **dict.fromkeys(_MODELS, "own.OwnModel")}
    _tokenizer(config, tokenizer, place)


def _tokenizer(config, tokenizer, place):
    """Of a kind that transformers does not have, where the config does not say of what kind else."""
    config.pop("architectures")
    config["model_type"] = "own"
    tokenizer |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer"] * 2}}


def _model(config, tokenizer, place):
    """A config that transformers has, and of which it has no language model."""
    config.clear()
    config |= {"model_type": "clap_audio_model", "architectures": ["OwnModel"]}
    config["auto_map"] = dict.fromkeys(_MODELS, "own.OwnModel")


def _part(config, tokenizer, place):
    """A model that transformers has, of which a part is to come from elsewhere; no argument reaches its loading."""
    text = {**config, "model_type": "clap_text_model", "auto_map": {"AutoModel": f"{place}--own.OwnModel"}}
    config.clear()
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text}


KINDS = {"all of it": _all_of_it, "the tokenizer": _tokenizer, "the model": _model, "a part": _part}


def hostile_model(place: Path, mark: Path, kind: str) -> Path:
    """The tiny model, of which what `kind` names needs code; to run the code writes to `mark`."""
    for part in ("policy", "tok"):
        shutil.copytree(OFFICIAL / part, place, dirs_exist_ok=True)
    code = _CODE.format(mark=str(mark))
    (place / "custom_generate").mkdir()
    for file in (place / "own.py", place / "custom_generate" / "generate.py"):
        file.write_text(code, encoding="utf-8")
    contents = [json.loads((place / name).read_text()) for name in ("config.json", "tokenizer_config.json")]
    KINDS[kind](*contents, place)
    for name, content in zip(("config.json", "tokenizer_config.json"), contents, strict=True):
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    return place
