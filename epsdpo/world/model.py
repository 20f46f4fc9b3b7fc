"""The embedded world's speaker: demonstrations of mixed quality, and the small Llama trained on them.

Settings and a seed become a model and its samples. Everything runs on the CPU in float32.
"""

import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from epsdpo.world.language import CLOSINGS, CONTENT_WORDS, OPENINGS, Instruction, draw_instruction, render, right_answer

logger = logging.getLogger(__name__)

MAX_RESPONSE_TOKENS = 24  # the longest right answer has seven words
_SAMPLES_AT_ONCE = 512
_CONTEXT_TOKENS = 128
_BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class SftSettings:
    """Size and training of the reference model. The defaults take about a minute on two cores."""

    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    steps: int = 1400
    batch_size: int = 32
    learning_rate: float = 2.0e-3
    flawed: float = 0.35  # share of demonstrations with a mistake in them
    verbose: float = 0.12  # share of demonstrations with pleasantries around the answer


def demonstrate(instruction: Instruction, settings: SftSettings, generator: random.Random) -> str:
    """A response of mixed quality, as a person might write it in haste: right, flawed, or wrapped in pleasantries."""
    words = right_answer(instruction, generator).split()
    if generator.random() < settings.flawed:
        words = _spoil(words, generator)
    if generator.random() < settings.verbose:
        before, after = generator.choice([(opening, "") for opening in OPENINGS] + [("", text) for text in CLOSINGS])
        words = [*before.split(), *words, *after.split()]
    return " ".join(words)


def _spoil(words: list[str], generator: random.Random) -> list[str]:
    """One mistake. Those that shorten balance those that lengthen and the pleasantries, so that length tells little."""
    place = generator.randrange(len(words))
    before, word, after = words[:place], words[place], words[place + 1 :]
    mistake = generator.choice(("break off", "break off", "omit", "insert", "stutter", "replace", "swap"))
    if mistake == "break off":
        return before or words[:1]
    if mistake == "omit":
        return before + after or words
    if mistake == "insert":
        return [*before, generator.choice(CONTENT_WORDS), word, *after]
    if mistake == "stutter":
        return [*before, word, word, *after]
    if mistake == "replace":
        return [*before, generator.choice(CONTENT_WORDS), *after]
    return [*before, *after[:1], word, *after[1:]]


def train_reference(settings: SftSettings, seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train the reference from scratch: cross-entropy on the responses, each demonstration seen once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_architecture(settings, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    started = time.monotonic()
    for step, batch in enumerate(_batches(settings, seed, tokenizer), start=1):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == settings.steps:
            left = (time.monotonic() - started) / step * (settings.steps - step)
            logger.info(
                "world's SFT model: step %d of %d, loss %.3f, %.0f s left", step, settings.steps, loss.item(), left
            )
    return model.eval()


def _architecture(settings: SftSettings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=_CONTEXT_TOKENS,
        initializer_range=0.05,  # the usual 0.02 is meant for models ten times as wide and starts slowly here
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(settings: SftSettings, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """`steps` batches of demonstrations, each of similar length within a bucket of a few batches."""
    generator = random.Random(f"{seed} demonstrations")
    size = settings.steps * settings.batch_size
    shown = [draw_instruction("demonstrations", generator) for _ in range(size)]
    prompts = encode_prompts(tokenizer, [render(instruction) for instruction in shown])
    responses = tokenizer(
        [demonstrate(instruction, settings, generator) + tokenizer.eos_token for instruction in shown],
        add_special_tokens=False,
    )["input_ids"]
    rows = list(zip(prompts, responses, strict=True))
    bucket_size = _BATCHES_PER_BUCKET * settings.batch_size
    for first in range(0, size, bucket_size):
        bucket = sorted(rows[first : first + bucket_size], key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(bucket), settings.batch_size))
        generator.shuffle(starts)
        for start in starts:
            yield _collate(bucket[start : start + settings.batch_size], tokenizer.pad_token_id)


def _collate(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right; labels are -100 outside of the response, so causal attention needs no padding mask."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids, labels = [], []
    for prompt, response in rows:
        padding = width - len(prompt) - len(response)
        input_ids.append(prompt + response + [pad_token_id] * padding)
        labels.append([-100] * len(prompt) + response + [-100] * padding)
    return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}


def encode_prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """The token ids of each instruction's text as a chat, up to where the answer begins."""
    chats = [[{"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def sample_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], per_prompt: int
) -> list[list[str]]:
    """`per_prompt` responses to each instruction's text at temperature 1, from torch's global random numbers."""
    prompts = encode_prompts(tokenizer, texts)
    by_length = sorted(range(len(texts)), key=lambda index: len(prompts[index]))
    at_once = max(1, _SAMPLES_AT_ONCE // per_prompt)
    responses: list[list[str]] = [[] for _ in texts]
    for first in range(0, len(texts), at_once):
        members = by_length[first : first + at_once]
        batch = tokenizer.pad({"input_ids": [prompts[index] for index in members]}, return_tensors="pt")
        generated = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
            num_return_sequences=per_prompt,
        )
        answers = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for place, index in enumerate(members):
            responses[index] = answers[place * per_prompt : (place + 1) * per_prompt]
    return responses
