"""A tiny random Llama that speaks the embedded world's words, and prompts for it; run as a script, it answers them."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epsdpo.data.rendering import RenderedPrompt
from epsdpo.experiment import EvaluateSection
from epsdpo.models.kept import open_store
from epsdpo.models.local import LocalEngine
from epsdpo.models.respond import respond
from epsdpo.world.language import build_tokenizer, render, sample_instructions

SETTINGS = EvaluateSection(temperature=1.0, max_new_tokens=24, batch_size=3)
SEED = 5


def tiny_model(tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform next-token distributions
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def rendered(tokenizer, text: str) -> RenderedPrompt:
    rendering = f"<bos><user> {text} <assistant>"
    ids = tokenizer(rendering, add_special_tokens=False)["input_ids"]
    return RenderedPrompt([{"role": "user", "content": text}], rendering, ids, 1)


def world_prompts(tokenizer, count: int) -> list[RenderedPrompt]:
    return [rendered(tokenizer, render(instruction)) for instruction in sample_instructions(count, 0, "prompts")]


def local_engine(tokenizer, settings=SETTINGS) -> LocalEngine:
    return LocalEngine(tiny_model(tokenizer), tokenizer, settings, SEED, {"model": "tiny", "seed": SEED})


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = build_tokenizer()
    with open_store(Path(sys.argv[1])) as store:
        respond(world_prompts(words, int(sys.argv[2])), local_engine(words), store, "tiny")
