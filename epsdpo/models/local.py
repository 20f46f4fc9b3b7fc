"""Responses of a causal language model in this process, to prompts of token ids.

It decodes in batches so that a response depends on its prompt and the seed, not on the company it is sampled in.
"""

from collections.abc import Iterator, Sequence
from typing import Any

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

from epsdpo.models.batches import padded
from epsdpo.models.prompt import RenderedPrompt
from epsdpo.models.response import Decoding, Response, own_generator


class LocalEngine:
    """A loaded model as an engine that answers prompts.

    Temperature 0 is greedy. Otherwise every prompt has its own stream of random numbers, made from the seed and the
    prompt's token ids. So the same prompts in another order get identical answers, and a prompt asked twice gets one
    answer twice. Other prompts in the list, or another batch size, change an answer only where padding changes the
    rounding of its logits enough to tip a draw.

    The end tokens are those of the settings, the tokenizer's and those of the model's `generation_config`, whose
    sampling and repetition settings are not used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Decoding,
        seed: int,
        made_by: dict[str, Any],
    ):
        self.made_by = made_by
        self._model, self._tokenizer, self._settings, self._seed = model.eval(), tokenizer, settings, seed

    def answers(self, prompts: Sequence[RenderedPrompt], missing: Sequence[bool]) -> Iterator[dict[int, Response]]:
        """Batch by batch. The batches are those of all prompts, so that after a restart not even rounding differs.

        Raises:
            ValueError: before any work, if a prompt is empty or leaves no room in the model's context.
        """
        prompt_ids = [prompt.token_ids for prompt in prompts]
        _check_prompts(self._model, prompt_ids, self._settings.max_new_tokens)
        config = _generation_config(self._model, self._tokenizer, self._settings)
        # Ties in length are ordered by content, which makes the batches independent of the order of the prompts.
        order = sorted(range(len(prompt_ids)), key=lambda index: (len(prompt_ids[index]), prompt_ids[index]))
        for start in range(0, len(order), self._settings.batch_size):
            members = order[start : start + self._settings.batch_size]
            if any(missing[index] for index in members):
                batch = [prompt_ids[index] for index in members]
                generated = _generate_batch(self._model, batch, config, self._settings, self._seed)
                yield {
                    index: _response(token_ids, self._tokenizer, config.eos_token_id)
                    for index, token_ids in zip(members, generated, strict=True)
                }


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Decoding) -> list[int]:
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, *settings.stop_token_ids}
    ends = sorted(end for end in ends if end is not None)
    if not ends:
        raise ValueError(
            "neither the model's generation_config nor the tokenizer names an end token (eos_token_id). Name one in "
            "stop_token_ids"
        )
    return ends


def _check_prompts(model: PreTrainedModel, prompt_ids: list[list[int]], max_new_tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} is empty: there is nothing to answer")
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but the model's context "
                f"ends at {context}. Shorten the prompt or lower max_new_tokens"
            )


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Decoding
) -> GenerationConfig:
    """Greedy decoding, in which `_DrawFromOwnStream` leaves a single token to choose where sampling is wanted."""
    ends = _end_tokens(model, tokenizer, settings)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    # What is left unset would be taken from the model's own generation_config.
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
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
    settings: Decoding,
    seed: int,
) -> list[list[int]]:
    """What follows each prompt, cut to `max_new_tokens`, with whatever padding `generate` put behind the end token."""
    ids, mask = padded(prompt_ids, config.pad_token_id, side="left")
    width = ids.shape[1]
    processors = LogitsProcessorList()
    if settings.temperature > 0.0:
        processors.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_p < 1.0:
            processors.append(TopPLogitsWarper(settings.top_p))
        uniforms = np.stack([own_generator(prompt, seed).random(settings.max_new_tokens) for prompt in prompt_ids])
        processors.append(_DrawFromOwnStream(torch.from_numpy(uniforms).to(model.device), width))
    generated = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=processors,
    )
    return generated[:, width:].tolist()


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
