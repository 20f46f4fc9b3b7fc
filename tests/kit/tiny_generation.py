"""A tiny random Llama that speaks the embedded world's words, and prompts for it; run as a script, it answers them."""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from epsdpo.experiment import EvaluateSection
from epsdpo.models.local import LocalEngine
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.respond import kept_responses, respond
from epsdpo.models.response import Response
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


def generate_responses(model, tokenizer, prompt_ids, settings, seed: int) -> list[Response]:
    """One response to each prompt of token ids, in their order, by a `LocalEngine`."""
    prompts = [RenderedPrompt([], "", ids, 0) for ids in prompt_ids]
    answered = {}
    for batch in LocalEngine(model, tokenizer, settings, seed, {}).answers(prompts, [True] * len(prompts)):
        answered |= batch
    return [answered[index] for index in range(len(prompts))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = build_tokenizer()
    with kept_responses(Path(sys.argv[1])) as kept:
        respond(world_prompts(words, int(sys.argv[2])), local_engine(words), kept, "tiny")
