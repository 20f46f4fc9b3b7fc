"""A tiny base model without a chat template, a tiny reward model and prompts: what SFT and sampling start from.

Run as a script, it samples pairs for the config and into the folder that it is given, one prompt at a time.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from epsdpo.data.on_policy.sample import sample_pairs
from epsdpo.experiment import Experiment, check_experiment, load_experiment
from kit.official import OFFICIAL

TURN = "<turn>"  # ends a turn, as Gemma's <end_of_turn> does; the base model has never seen it as an end
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' so' if message['role'] == 'assistant' else '' }}"
    "{{ message['content'] + '" + TURN + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' so' }}{% endif %}"
)
TRAIN = {
    "beta": 0.1,
    "learning_rate": 1.0e-3,
    "global_batch_size": 4,
    "per_device_train_batch_size": 4,
    "max_length": 64,
    "bf16": False,
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def write_base_model(folder: Path) -> Path:
    """The tiny Llama and its tokenizer with one special token more."""
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    tokenizer.add_tokens([AddedToken(TURN, special=True)])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(OFFICIAL / "policy", dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_reward_model(folder: Path) -> Path:
    """Random, but of another opinion on each text."""
    tokenizer = AutoTokenizer.from_pretrained(OFFICIAL / "tok")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path: Path) -> Path:
    """The six different prompts of the tiny pairs, the first twice, each beside messages that are not to be asked."""
    prompts = [json.loads(line)["prompt"] for line in (OFFICIAL / "pairs.jsonl").read_text().splitlines()]
    prompts = list(dict.fromkeys(prompts))
    answered = [{"role": "user", "content": "another question"}, {"role": "assistant", "content": "an answer"}]
    rows = [{"prompt": prompt, "messages": answered} for prompt in [*prompts, prompts[0]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_conversations(path: Path) -> Path:
    """The first twelve of the tiny pairs, as messages."""
    rows = [json.loads(line) for line in (OFFICIAL / "pairs.jsonl").read_text().splitlines()[:12]]
    conversations = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {part: [{"role": "assistant", "content": row[part]}] for part in ("chosen", "rejected")}
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")
    return path


def settings(folder: Path, **on_policy: object) -> dict:
    """A config of sampled pairs and SFT on models in `folder`, which are written there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    prompts = write_prompts(folder / "prompts.jsonl")
    return {
        "name": "tiny",
        "method": "epsilon_dpo",
        "data": {
            "source": "on_policy",
            "on_policy": {
                "prompts": {"source": str(prompts), "column": "prompt"},
                "ranker": {"model": str(write_reward_model(folder / "reward")), "dtype": "float32", "batch_size": 4},
                "responses_per_prompt": 3,
                "max_new_tokens": 12,
                "batch_size": 4,
                **on_policy,
            },
        },
        "model": {
            "name_or_path": str(write_base_model(folder / "base")),
            "chat_template": str(folder / "template.jinja"),
            "sft": {
                "learning_rate": 1.0e-3,
                "global_batch_size": 4,
                "per_device_train_batch_size": 2,
                "max_length": 64,
                "logging_steps": 1,
                "save_steps": 1,
            },
        },
        "train": TRAIN,
    }


def experiment_of(values: dict) -> Experiment:
    return check_experiment(values, where="test")


def write_config(values: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def copy_without(folder: Path, target: Path, *names: str) -> Path:
    """A copy of a folder that lacks some files, as a kill at an earlier moment would have left it."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))
    return target


if __name__ == "__main__":
    torch.set_num_threads(1)
    sample_pairs(load_experiment(sys.argv[1]), sys.argv[2])
