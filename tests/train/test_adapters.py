"""LoRA: what is merged is what was trained, for every choice of layers that is accepted; others are refused early."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from kit.official import OFFICIAL
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
)

from epsdpo.__main__ import main
from epsdpo.experiment import ConfigError, LoraSection, check_experiment
from epsdpo.train.adapters import check_adapters, merge_adapter
from epsdpo.train.preferences import main as train_main
from epsdpo.train.sft import main as sft_main

_WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4}


def _config(name, vocab_size):
    return {
        "llama_tied": lambda: LlamaConfig(**_WIDTHS, vocab_size=vocab_size, tie_word_embeddings=True),
        "llama": lambda: LlamaConfig(**_WIDTHS, vocab_size=vocab_size),
        "gemma2_tied": lambda: Gemma2Config(**_WIDTHS, vocab_size=vocab_size, head_dim=8, query_pre_attn_scalar=8),
        "gpt2_tied": lambda: GPT2Config(**_GPT2, vocab_size=vocab_size),
        "gpt2": lambda: GPT2Config(**_GPT2, vocab_size=vocab_size, tie_word_embeddings=False),
        "neox": lambda: GPTNeoXConfig(**_WIDTHS, vocab_size=vocab_size),
    }[name]()


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """The folder of a tiny model with random weights and the tiny tokenizer, by the name of its architecture."""
    folder = tmp_path_factory.mktemp("models")

    def write(name):
        if not (folder / name).exists():
            tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(_config(name, len(tokenizer))).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name

    return write


def _log_probabilities(model):
    with torch.no_grad():
        return model.eval()(torch.arange(5, 37).view(2, 16)).logits.log_softmax(-1)


ACCEPTED = [
    ("llama_tied", "all-linear"),
    ("llama_tied", ["q_proj", "down_proj"]),
    ("llama_tied", r".*\.[qkv]_proj"),
    ("llama", "all-linear"),
    ("llama", ["embed_tokens", "v_proj"]),
    ("llama", ".*embed.*"),
    ("gemma2_tied", "all-linear"),
    ("gpt2_tied", "all-linear"),
    ("gpt2_tied", ["c_attn", "wpe"]),
    ("gpt2", ["wte", "c_fc"]),
    ("neox", ["embed_in", "dense"]),
]
HEAD, SHARED, NOTHING, UNABLE = "output head", "shares its weight", "matches no layer", "cannot have an adapter"
REFUSED = [
    ("llama_tied", ["embed_tokens"], SHARED),
    ("llama_tied", ["q_proj", "model.embed_tokens"], SHARED),
    ("llama_tied", ".*(embed_tokens|q_proj)", SHARED),
    ("llama_tied", ["lm_head"], HEAD),
    ("llama", ["lm_head", "q_proj"], HEAD),
    ("llama", "lm_head|.*q_proj", HEAD),
    ("gemma2_tied", ["embed_tokens", "lm_head"], HEAD),
    ("gemma2_tied", ["embed_tokens"], SHARED),
    ("gpt2_tied", ["wte"], SHARED),
    ("gpt2_tied", ["te"], NOTHING),
    ("neox", ["lm_head"], HEAD),
    ("llama", ["query"], NOTHING),
    ("llama", ["q_proj", "wte"], NOTHING),
    ("llama", ".*query", NOTHING),
    ("llama", [], NOTHING),
    ("llama", ["norm"], UNABLE),
    ("gpt2", ["ln_1", "c_attn"], UNABLE),
    ("llama_tied", ".*", UNABLE),
]


@pytest.mark.parametrize(("name", "targets"), ACCEPTED)
def test_the_merged_model_is_the_trained_one(model_of, tmp_path, name, targets):
    section = LoraSection(r=4, target_modules=targets)
    base = AutoModelForCausalLM.from_pretrained(model_of(name), dtype=torch.float32)
    check_adapters(base.config, section)
    torch.manual_seed(1)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False)
    )
    for parameter in filter(lambda parameter: parameter.requires_grad, adapted.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    experiment = check_experiment(
        {
            "name": "run",
            "method": "dpo",
            "train": {},
            "data": {"source": "pairs.jsonl"},
            "model": {"name_or_path": str(model_of(name)), "lora": section.model_dump()},
        },
        "run.yaml",
    )
    merge_adapter(experiment, tmp_path / "adapter", tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert not isinstance(merged, PeftModel)
    trained, untrained = _log_probabilities(adapted), _log_probabilities(adapted.unload())
    torch.testing.assert_close(_log_probabilities(merged), trained, atol=1e-4, rtol=0)
    assert (trained - untrained).abs().max() > 0.01


@pytest.mark.parametrize(("name", "targets", "why"), REFUSED)
def test_adapters_that_cannot_be_trained_or_merged_are_refused(model_of, name, targets, why):
    config = AutoModelForCausalLM.from_pretrained(model_of(name)).config
    with pytest.raises(ConfigError, match=why) as refusal:
        check_adapters(config, LoraSection(target_modules=targets))
    assert str(refusal.value).startswith(f"model.lora.target_modules is {targets!r}")
    assert "'all-linear'" in str(refusal.value) and len(str(refusal.value)) < 600  # the remedy, and no whole module


@pytest.mark.parametrize(("name", "targets", "why"), [REFUSED[0], REFUSED[4], REFUSED[12], REFUSED[15]])
def test_check_sft_and_training_refuse_before_any_work(model_of, tmp_path, capsys, name, targets, why):
    rows = (OFFICIAL / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"prompt", "chosen", "rejected"} <= set(json.loads(rows[0]))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows[:8]) + "\n", encoding="utf-8")
    values = {
        "method": "epsilon_dpo",
        "data": {"source": str(tmp_path / "pairs.jsonl")},
        "model": {"name_or_path": str(model_of(name)), "lora": {"target_modules": targets}},
        "train": {
            "beta": 0.1,
            "global_batch_size": 4,
            "per_device_train_batch_size": 4,
            "max_length": 64,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "report_to": "none",
        },
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["check", str(config)]) == 2
    assert why in capsys.readouterr().out
    assert train_main(["--config", str(config), "--output", str(tmp_path / "run")]) == 2
    assert why in capsys.readouterr().err
    values["model"]["sft"] = {"global_batch_size": 4}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    data, output = str(tmp_path / "run" / "data"), str(tmp_path / "sft")
    assert sft_main(["--config", str(config), "--data", data, "--train-dir", output]) == 2
    assert why in capsys.readouterr().err
    assert not list(Path(tmp_path).rglob("steps.jsonl")) and not list(Path(tmp_path).rglob("checkpoint-*"))


def test_check_looks_at_the_adapters_of_the_embedded_world_too(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("method: dpo\ntrain: {beta: 0.1}\nmodel: {lora: {target_modules: [lm_head]}}\n", encoding="utf-8")
    assert main(["check", str(config)]) == 2
    assert HEAD in capsys.readouterr().out
