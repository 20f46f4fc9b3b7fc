"""Responses of a causal language model to prompts of token ids.

This module knows how to decode in batches so that a response depends on its prompt and the seed, not on the company it
is sampled in. What the prompts ask and how responses compare is left to others.
"""

import hashlib
import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from epsdpo.experiment import EvaluateSection

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_PROGRESS_LINES = 5.0


@dataclass(frozen=True)
class Response:
    """One answer.

    Attributes:
        text: decoded without special tokens.
        token_ids: everything that was generated, the end token included.
        finished: whether the model ended the response; False if `max_new_tokens` cut it.
    """

    text: str
    token_ids: list[int]
    finished: bool


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    settings: EvaluateSection,
    seed: int,
) -> list[Response]:
    """Answer each prompt once, in the order given.

    Temperature 0 is greedy. Otherwise every prompt has its own stream of random numbers, made from the seed and the
    prompt's token ids. So the same prompts in another order get identical answers, and a prompt asked twice gets one
    answer twice. Other prompts in the list, or another batch size, change an answer only where padding changes the
    rounding of its logits enough to tip a draw.

    The end tokens are the tokenizer's and those of the model's `generation_config`, whose sampling and repetition
    settings are not used.

    Args:
        model: a causal language model; it is put into evaluation mode.
        tokenizer: decodes the responses; its EOS ends them too.
        prompt_ids: token ids of each prompt, generation prompt included.
        settings: temperature, top_p, max_new_tokens and batch_size.
        seed: of the sampling.

    Raises:
        ValueError: before any work, if a prompt is empty or leaves no room in the model's context.
    """
    _check_prompts(model, prompt_ids, settings.max_new_tokens)
    model.eval()
    config = _generation_config(model, tokenizer, settings.max_new_tokens)
    # Ties in length are ordered by content, which makes the batches independent of the order of the prompts.
    order = sorted(range(len(prompt_ids)), key=lambda index: (len(prompt_ids[index]), prompt_ids[index]))
    responses: list[Response | None] = [None] * len(prompt_ids)
    started = reported = time.monotonic()
    for start in range(0, len(order), settings.batch_size):
        members = order[start : start + settings.batch_size]
        generated = _generate_batch(model, [prompt_ids[index] for index in members], config, settings, seed)
        for index, token_ids in zip(members, generated, strict=True):
            responses[index] = _response(token_ids, tokenizer, config.eos_token_id)
        now, done = time.monotonic(), start + len(members)
        if now - reported > _SECONDS_BETWEEN_PROGRESS_LINES or done == len(order):
            remaining = (now - started) / done * (len(order) - done)
            logger.info("answered %d of %d prompts, about %.0f s left", done, len(order), remaining)
            reported = now
    return responses


def _check_prompts(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} is empty: there is nothing to answer")
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but the model's context "
                f"ends at {context}. Shorten the prompt or lower evaluate.max_new_tokens"
            )


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding, in which `_DrawFromOwnStream` leaves a single token to choose where sampling is wanted."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    ends = sorted(end for end in ends if end is not None)
    if not ends:
        raise ValueError("neither the model's generation_config nor the tokenizer names an end token (eos_token_id)")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    # What is left unset would be taken from the model's own generation_config.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        eos_token_id=ends,
        pad_token_id=pad,
    )


@torch.inference_mode()
def _generate_batch(
    model: PreTrainedModel,
    prompt_ids: list[list[int]],
    config: GenerationConfig,
    settings: EvaluateSection,
    seed: int,
) -> list[list[int]]:
    """What follows each prompt, cut to `max_new_tokens`, with whatever padding `generate` put behind the end token."""
    width = max(len(ids) for ids in prompt_ids)
    ids = torch.full((len(prompt_ids), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompt_ids):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    processors = LogitsProcessorList()
    if settings.temperature > 0.0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
        uniforms = np.stack([_uniforms(prompt, seed, settings.max_new_tokens) for prompt in prompt_ids])
        processors.append(_DrawFromOwnStream(torch.from_numpy(uniforms).to(model.device), width))
    generated = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=processors,
    )
    return generated[:, width:].tolist()


def _uniforms(prompt: list[int], seed: int, count: int) -> np.ndarray:
    """The prompt's own random numbers in [0, 1), one per token of its response."""
    digest = hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype="<u4").tolist()]).random(count)


class _DrawFromOwnStream(LogitsProcessor):
    """Draws each row's next token by inverting its cumulative distribution at the row's own uniform number.

    `torch.multinomial` shares one stream between the rows of a batch, so that a response would depend on its company.
    """

    def __init__(self, uniforms: torch.Tensor, prompt_width: int):
        self.uniforms = uniforms
        self.prompt_width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the drawn token of each row at 0 and every other at -inf; `scores` is (rows, vocabulary)."""
        step = input_ids.shape[1] - self.prompt_width
        # In float64 the last entry stays within reach of every draw, whatever the vocabulary.
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        threshold = self.uniforms[:, step : step + 1] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _response(generated: list[int], tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> Response:
    end = next((place for place, token in enumerate(generated) if token in ends), None)
    token_ids = generated if end is None else generated[: end + 1]
    return Response(tokenizer.decode(token_ids, skip_special_tokens=True), token_ids, end is not None)
