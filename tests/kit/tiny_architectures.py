"""Miniatures of the models in configs/paper and configs/small, and rows as their data sets have them, made on the spot.

A miniature has the architecture, special tokens and chat format of the model whose place it takes, random weights, and
a tokenizer of a few hundred pieces, trained on the rows below. The chat formats are facts; the templates are ours.
"""

import gzip
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

DATA = Path(__file__).parents[1] / "data"
HH_ROWS = [json.loads(line) for line in (DATA / "hh_rows.jsonl").read_text(encoding="utf-8").splitlines()]

# Prompt, a good answer, a bad one.
_QUESTIONS = [
    ("How many legs has a spider?", "A spider has eight legs.", "Six, like all insects."),
    ("Name the capital of Portugal.", "The capital of Portugal is Lisbon.", "Madrid."),
    (
        "Write a haiku about rain.",
        "Rain on the tin roof,\na slow drum for an old song,\nthe street keeps the beat.",
        "Rain.",
    ),
    ("What is 7 times 8?", "7 × 8 = 56.", "It is 54."),
    ("Translate 'good morning' into French.", "« Bonjour » is the usual greeting.", "Guten Morgen."),
    ("Why is the sky blue?", "Air scatters short, blue waves of sunlight more than long ones.", "It reflects the sea."),
    ("Give me a synonym of 'quick'.", "Fast, rapid or swift.", "Slow."),
    ("Sort 3, 1, 2.", "1, 2, 3", "3, 2, 1"),
    ("Is 91 a prime number?", "No: 91 = 7 × 13.", "Yes."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "Christopher Marlowe, in 1650."),
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it.", "Fry it."),
    ("Spell 'necessary'.", "n-e-c-e-s-s-a-r-y", "n-e-c-c-e-s-a-r-y"),
]


def _conversation(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


ULTRAFEEDBACK_ROWS = [
    {"prompt": prompt, "chosen": _conversation(prompt, good), "rejected": _conversation(prompt, bad)}
    for prompt, good, bad in _QUESTIONS
]

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

_LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def _chatml(system: str) -> str:
    return (
        "{% if messages[0].role != 'system' %}<|im_start|>system\n" + system + "<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# The model whose place it takes -> class of its config and what that needs beside the sizes; special tokens, BOS, EOS
# and padding first where there are any; chat template.
_ARCHITECTURES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        LlamaConfig,
        {"rope_theta": 500000.0},
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        _LLAMA3_TEMPLATE,
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (
        MistralConfig,
        {"sliding_window": None},
        {"bos_token": "<s>", "eos_token": "</s>"},
        [],
        _MISTRAL_TEMPLATE,
    ),
    "google/gemma-2-2b": (
        Gemma2Config,
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "final_logit_softcapping": 30.0},
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        ["<start_of_turn>", "<end_of_turn>"],
        _GEMMA_TEMPLATE,
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        Qwen2Config,
        {"tie_word_embeddings": False},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>"],
        _chatml("You are a helpful assistant."),
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": (
        Qwen2Config,
        {"tie_word_embeddings": True},
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>"],
        _chatml("You are a helpful assistant."),
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        LlamaConfig,
        {"tie_word_embeddings": True},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        ["<|endoftext|>"],
        _chatml("You are a helpful assistant."),
    ),
}
MODELS = tuple(_ARCHITECTURES)


def save_miniature(name: str, folder: Path) -> Path:
    """Write the miniature of a hub model into a new folder, as a user has a model, and return the folder."""
    config_class, settings, named_tokens, more_tokens, template = _ARCHITECTURES[name]
    tokenizer = _tokenizer([*dict.fromkeys([*named_tokens.values(), *more_tokens])])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named_tokens)
    wrapped.save_pretrained(folder)
    config = config_class(
        **{**_SIZES, **settings},
        vocab_size=len(wrapped),
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _tokenizer(special: list[str]) -> Tokenizer:
    """A byte-level BPE of the texts in this module and of the HH rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for question in _QUESTIONS for text in question]
    tokenizer.train_from_iterator([*texts, *(row["chosen"] for row in HH_ROWS)], trainer)
    return tokenizer


def save_data(folder: Path) -> dict[str, Path]:
    """Write small stand-ins for the data sets that configs name: hub id -> local folder in the same layout."""
    ultrafeedback, prompts, hh = folder / "ultrafeedback", folder / "alpaca_eval", folder / "hh"
    for place in (ultrafeedback, prompts, hh / "helpful-base", hh / "harmless-base"):
        place.mkdir(parents=True)
    for split, rows in {"train": ULTRAFEEDBACK_ROWS[:8], "test": ULTRAFEEDBACK_ROWS[8:]}.items():
        _write_rows(ultrafeedback / f"{split}.jsonl.gz", rows)
    for part, rows in {"helpful-base": HH_ROWS[::2], "harmless-base": HH_ROWS[1::2]}.items():
        _write_rows(hh / part / "train.jsonl.gz", rows)
        _write_rows(hh / part / "test.jsonl.gz", rows)
    answered = [{"instruction": prompt, "output": good} for prompt, good, _ in _QUESTIONS[:4]]
    (prompts / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(answered), encoding="utf-8")
    return {
        "princeton-nlp/llama3-ultrafeedback": ultrafeedback,
        "princeton-nlp/mistral-instruct-ultrafeedback": ultrafeedback,
        "tatsu-lab/alpaca_eval": prompts,
        "Anthropic/hh-rlhf": hh,
    }


def _write_rows(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
