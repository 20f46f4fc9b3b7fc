"""What a model reads for a prompt, and whether it is what the model was trained to read.

This module knows chat templates, BOS, and the training prompts in a prepared folder. Which prompts there are is left to
`epsdpo.generation.prompts`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from epsdpo.data import REPORT
from epsdpo.data.rows import STANDARD, Messages, cut_prompt, render_prompt
from epsdpo.data.sources import DataError

# Stands for the words of a turn, to see what the template puts around them.
_WORDS = "x7words7x"
_TRAINING_ROWS = 256
_SHOWN = 300


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it.

    Attributes:
        messages: the conversation.
        text: the conversation through the chat template, up to the header of the assistant's turn.
        token_ids: of `text`.
        bos: how many BOS the ids start with.
    """

    messages: Messages
    text: str
    token_ids: list[int]
    bos: int


@dataclass(frozen=True)
class TrainingPrompts:
    """The first prompts of a prepared folder: texts, ids after the cut to `max_prompt_length`, and their BOS."""

    texts: list[str]
    token_ids: list[list[int]]
    templated: bool
    bos: int
    max_prompt_length: int | None
    where: str


def read_training_prompts(data_dir: Path) -> TrainingPrompts:
    """What the policy was trained to read, for `render_prompts`.

    Raises:
        DataError: if the folder has not been prepared.
    """
    try:
        report = json.loads((data_dir / REPORT).read_text(encoding="utf-8"))
        rows = next(
            pq.ParquetFile(data_dir / "train.parquet").iter_batches(_TRAINING_ROWS, columns=["prompt", "prompt_ids"])
        )
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: not there; run the prepare stage of this experiment first") from error
    split = report["splits"]["train"]
    return TrainingPrompts(
        rows.column("prompt").to_pylist(),
        rows.column("prompt_ids").to_pylist(),
        split["format"] != STANDARD,
        split["bos_per_sequence"],
        report["max_prompt_length"],
        str(data_dir / "train.parquet"),
    )


def render_prompts(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, training: TrainingPrompts
) -> list[RenderedPrompt]:
    """Conversations as the model reads them: through the chat template, or as plain text if training's pairs were.

    The result is held to the training prompts: as many BOS at the start, the same text around the user's words, the
    same tokens for the same text. A model that is asked in another form than it was trained in answers worse, and
    nothing in its answers says why.

    Raises:
        DataError: if the template refuses a conversation, plain text is asked for several turns, or a prompt is not
            rendered as training's were; the message shows both.
    """
    prompts = render_untrained(conversations, tokenizer, templated=training.templated)
    for prompt in prompts:
        if prompt.bos != training.bos:
            raise _mismatch(f"starts with {prompt.bos} BOS, and training's with {training.bos}", prompt, training)
    _check_frames(prompts, tokenizer, training)
    return prompts


def render_untrained(
    conversations: Sequence[Messages], tokenizer: PreTrainedTokenizerBase, *, templated: bool = True
) -> list[RenderedPrompt]:
    """Conversations as `render_prompts` writes them, where there is no training yet that they could be held to.

    Raises:
        DataError: if the template refuses a conversation, or plain text is asked for several turns.
    """
    texts = [_render(messages, tokenizer, templated) for messages in conversations]
    return [
        RenderedPrompt(messages, text, tokens, _leading(tokens, tokenizer.bos_token_id))
        for messages, text, tokens in zip(conversations, texts, _tokenise(texts, tokenizer, templated), strict=True)
    ]


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, templated: bool) -> str:
    if not templated:
        if len(messages) > 1:
            raise DataError(
                f"a prompt has {len(messages)} turns, but the model was trained on plain text, which has none. Set "
                "evaluate.prompts.single_turn, or train on conversations"
            )
        return messages[0]["content"]
    try:
        return render_prompt(messages, tokenizer)
    except TemplateError as error:
        turns = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the turns {turns}: {error}") from error


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase, templated: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=not templated, verbose=False)["input_ids"] if texts else []


def _leading(token_ids: list[int], bos: int | None) -> int:
    return next((place for place, token in enumerate(token_ids) if token != bos), len(token_ids))


def _check_frames(prompts: list[RenderedPrompt], tokenizer: PreTrainedTokenizerBase, training: TrainingPrompts) -> None:
    """Refuse a prompt that opens or closes as none of the training prompts does.

    One that does is enough: training data may mix conversations with and without a system turn, and a prompt cut from
    the left has lost its opening.
    """
    again = _tokenise(training.texts, tokenizer, training.templated)
    cut = [cut_prompt(tokens, training.max_prompt_length) for tokens in again]
    if not any(tokens == trained for tokens, trained in zip(cut, training.token_ids, strict=True)):
        raise _mismatch("is tokenised by rules that give training's own prompts other tokens", prompts[0], training)
    known: set[tuple[str, str]] = set()
    for prompt in prompts:
        opening, closing = _frame(prompt.messages, tokenizer, training.templated)
        if (opening, closing) in known:
            continue
        if not any(text.startswith(opening) and text.endswith(closing) for text in training.texts):
            raise _mismatch("is rendered around the user's words as no training prompt is", prompt, training)
        known.add((opening, closing))


def _frame(messages: Messages, tokenizer: PreTrainedTokenizerBase, templated: bool) -> tuple[str, str]:
    """The text before the first and after the last words of user or assistant."""
    if not templated:
        return "", ""
    words = [message if message["role"] == "system" else {**message, "content": _WORDS} for message in messages]
    text = render_prompt(words, tokenizer)
    return text[: text.find(_WORDS)], text[text.rfind(_WORDS) + len(_WORDS) :]


def _mismatch(what: str, prompt: RenderedPrompt, training: TrainingPrompts) -> DataError:
    return DataError(
        f"an evaluation prompt {what}.\n"
        f"evaluation: {_shown(prompt.text)}, tokens {prompt.token_ids[:8]} … {prompt.token_ids[-8:]}\n"
        f"training:   {_shown(training.texts[0])}, tokens {training.token_ids[0][:8]} … {training.token_ids[0][-8:]} "
        f"(first of {training.where})\n"
        "Evaluate with the tokenizer and chat template that prepared the data. A system turn that training had goes "
        "into the prompts' messages; a template that writes today's date needs the date fixed in a local copy"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")
