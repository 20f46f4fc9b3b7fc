"""What a model reads for a prompt, and whether it is what the model was trained to read: BOS, tokens, and what stands
around the user's words."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from epsdpo.data.prepared import REPORT
from epsdpo.data.rows import STANDARD, cut_prompt
from epsdpo.data.sources import DataError
from epsdpo.experiment import TEMPLATE_DATE
from epsdpo.methods.beside import SETTINGS, SHOWN, Messages, Refused, left_out
from epsdpo.methods.chat_template import TEMPLATE_REFUSES, render_chat
from epsdpo.models.prompt import RenderedPrompt

logger = logging.getLogger(__name__)

# Stands for the words of a turn, to see what the template puts around them.
_WORDS = "x7words7x"
_TRAINING_ROWS = 256
_SHOWN = 300


@dataclass(frozen=True)
class TrainingPrompts:
    """The first prompts of a prepared folder: texts, ids after the cut to `max_prompt_length`, their BOS, and the day
    that the chat template was told."""

    texts: list[str]
    token_ids: list[list[int]]
    templated: bool
    bos: int
    max_prompt_length: int | None
    day: str
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
        report.get("template_date", TEMPLATE_DATE),  # folders from before the day was kept do not say
        str(data_dir / "train.parquet"),
    )


def render_prompts(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    training: TrainingPrompts,
    variables: Sequence[Mapping[str, Any]] | None = None,
) -> list[RenderedPrompt]:
    """Conversations as the model reads them: through the chat template, or as plain text if training's pairs were.

    The result is held to the training prompts: as many BOS at the start, the same text around the user's words, the
    same tokens for the same text. A model that is asked in another form than it was trained in answers worse, and
    nothing in its answers says why.

    Args:
        variables: of each conversation what else the template is told; None where no prompt brings anything.

    Raises:
        DataError: if the template refuses a conversation or leaves a part of it out, plain text is asked for several
            turns or tools, or a prompt is not rendered as training's were; the message shows both.
    """
    prompts = render_untrained(conversations, tokenizer, training.day, variables, templated=training.templated)
    for prompt in prompts:
        if prompt.bos != training.bos:
            raise _mismatch(f"starts with {prompt.bos} BOS, and training's with {training.bos}", prompt, training)
    _check_frames(prompts, tokenizer, training)
    return prompts


def render_untrained(
    conversations: Sequence[Messages],
    tokenizer: PreTrainedTokenizerBase,
    day: str,
    variables: Sequence[Mapping[str, Any]] | None = None,
    *,
    templated: bool = True,
) -> list[RenderedPrompt]:
    """Conversations as `render_prompts` writes them, where there is no training yet that they could be held to.

    Args:
        day: what the chat template is told when it asks for today's date (`data.template_date`).
        variables: as in `render_prompts`.

    Raises:
        DataError: if the template refuses a conversation or leaves a part of it out, or plain text is asked for several
            turns or tools.
    """
    told = [{}] * len(conversations) if variables is None else variables
    unused: Counter[str] = Counter()
    texts = []
    for messages, its in zip(conversations, told, strict=True):
        text, useless = _render(messages, tokenizer, day, its, templated)
        texts.append(text)
        unused.update(useless)
    for name, count in unused.items():
        logger.warning("%d prompts bring %s, for which the chat template has no use", count, name)
    token_ids = _tokenise(texts, tokenizer, templated)
    return [
        RenderedPrompt(messages, text, tokens, _leading(tokens, tokenizer.bos_token_id), its)
        for messages, text, tokens, its in zip(conversations, texts, token_ids, told, strict=True)
    ]


def _render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, day: str, variables: Mapping[str, Any], templated: bool
) -> tuple[str, list[str]]:
    """The text, and names of what the template had no use for."""
    if not templated:
        if shown := [name for name in SHOWN if name in variables]:
            raise DataError(f"a prompt brings {' and '.join(shown)}, but the model was trained on plain text")
        if len(messages) > 1:
            raise DataError(
                f"a prompt has {len(messages)} turns, but the model was trained on plain text, which has none. Set "
                "evaluate.prompts.single_turn, or train on conversations"
            )
        return messages[0]["content"], [f"{SETTINGS}.{name}" for name in variables]

    def write(turns: Messages, told: Mapping[str, Any]) -> str:
        return render_chat(turns, tokenizer, day, answer_next=True, **told)

    try:
        text = write(messages, variables)
        return text, left_out(messages, [], variables, text, tokenizer, write)
    except TEMPLATE_REFUSES as error:
        turns = ", ".join(message["role"] for message in messages)
        raise DataError(f"the chat template of {tokenizer.name_or_path} refuses the turns {turns}: {error}") from error
    except Refused as refusal:
        raise DataError(
            f"the chat template of {tokenizer.name_or_path} leaves out of a prompt: {refusal.message}. Take the prompt "
            f"out, or a template that writes it: {_shown(text)}"
        ) from refusal


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
        opening, closing = _frame(prompt, tokenizer, training)
        if (opening, closing) in known:
            continue
        if not any(text.startswith(opening) and text.endswith(closing) for text in training.texts):
            raise _mismatch("is rendered around the user's words as no training prompt is", prompt, training)
        known.add((opening, closing))


def _frame(prompt: RenderedPrompt, tokenizer: PreTrainedTokenizerBase, training: TrainingPrompts) -> tuple[str, str]:
    """The text before the first and after the last words of user or assistant."""
    if not training.templated:
        return "", ""
    messages = prompt.messages
    words = [message if message["role"] == "system" else {**message, "content": _WORDS} for message in messages]
    text = render_chat(words, tokenizer, training.day, answer_next=True, **prompt.variables)
    # Tools and documents stand before the words, and are each prompt's own.
    opening = "" if any(name in prompt.variables for name in SHOWN) else text[: text.find(_WORDS)]
    return opening, text[text.rfind(_WORDS) + len(_WORDS) :]


def _mismatch(what: str, prompt: RenderedPrompt, training: TrainingPrompts) -> DataError:
    return DataError(
        f"an evaluation prompt {what}.\n"
        f"evaluation: {_shown(prompt.text)}, tokens {prompt.token_ids[:8]} … {prompt.token_ids[-8:]}\n"
        f"training:   {_shown(training.texts[0])}, tokens {training.token_ids[0][:8]} … {training.token_ids[0][-8:]} "
        f"(first of {training.where})\n"
        "Evaluate with the tokenizer and chat template that prepared the data. A system turn, tools or "
        "chat_template_kwargs that training had go into the prompts' rows"
    )


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}")
