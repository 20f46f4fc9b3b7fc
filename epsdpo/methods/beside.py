"""What a row brings beside its prompt and its responses, and what a chat template makes of it.

Some columns and fields change what the model should read: they are written by the template, or the row is refused by
name. All others are annotations, which are counted. Both are known by the names that data sets and transformers give
them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from epsdpo.files import is_writable, texts_in
from epsdpo.methods.chat_template import TEMPLATE_REFUSES, knows_variable

Messages = list[dict[str, Any]]

TOOLS, DOCUMENTS, SETTINGS = "tools", "documents", "chat_template_kwargs"
SHOWN = (TOOLS, DOCUMENTS)  # variables of the template that are text for the model, and not a setting
SYSTEM = ("system", "system_prompt")
WRITTEN = (TOOLS, DOCUMENTS, SETTINGS, *SYSTEM)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
QUESTION = "instruction"  # Alpaca's question, of which these columns hold the rest
REST_OF_QUESTION = ("input", "context", "history")

# Why a row may be refused for what it brings.
REFUSALS = {
    "media": "it brings images, video or audio, and the models here read text alone",
    "question_apart": f"a part of the question is not in its {QUESTION} but in {', '.join(REST_OF_QUESTION)}",
    "unreadable_settings": f"{TOOLS} and {DOCUMENTS} must be lists of objects, or JSON of one, and {SETTINGS} an "
    "object of the template's own variables",
    "two_systems": f"its {' or '.join(SYSTEM)} is not the system turn that it has already",
    "needs_template": f"it brings {TOOLS}, {DOCUMENTS} or a system text, for which plain text has no place",
    "template_leaves_out": "the chat template does not write something that it brings",
}

_MEDIA_BUT_IMAGES = tuple(name for name in MEDIA if not name.startswith("image"))  # images TRL refuses itself
_CALLS = ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing: transformers fills in the others from any
# What belongs to whoever calls the template, and not to a row.
_NOT_OF_A_ROW = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {*SHOWN}


class Refused(Exception):
    """A row that cannot be used, with the reason (a key of a table of refusals) and, where there is one, a message."""

    def __init__(self, reason: str, message: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.message = message


def has_value(value: Any) -> bool:
    """Whether a column says anything in a row: null, and an empty text, list or object do not."""
    return bool(value.strip()) if isinstance(value, str) else value is not None and value not in ([], {})


def brings(row: Mapping[str, Any]) -> list[str]:
    """The columns from which a usable row has something for the chat template."""
    return [name for name in WRITTEN if (has_value if name in SYSTEM else _parsed)(row.get(name))]


def template_variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a row hands to the chat template: tools, documents and its own settings.

    Raises:
        Refused: as `media`, `question_apart` or `unreadable_settings`.
    """
    for names, reason in ((MEDIA, "media"), (REST_OF_QUESTION, "question_apart")):
        if any(has_value(row.get(name)) for name in names):
            raise Refused(reason)
    settings = _parsed(row.get(SETTINGS))
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or _NOT_OF_A_ROW & set(settings):
        raise Refused("unreadable_settings")
    # As in TRL, the settings have the last word.
    variables = {name: _parsed(row.get(name)) for name in SHOWN} | settings
    for name in SHOWN:
        value = variables[name] = _parsed(variables[name])
        if has_value(value) and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise Refused("unreadable_settings")
    if not all(is_writable(text) for _, text in texts_in(variables)):
        raise Refused("unreadable_settings")
    return {name: value for name, value in variables.items() if value is not None and (value or name not in SHOWN)}


def with_system(messages: Messages, row: Mapping[str, Any]) -> Messages:
    """The conversation with the system text of the row's own column in front, if it is not there already.

    Raises:
        Refused: as `two_systems` if the row says two things, and as `unreadable_settings` if one is no text that can be
            written.
    """
    said = [row[name] for name in SYSTEM if has_value(row.get(name))]
    if not all(isinstance(text, str) and is_writable(text) for text in said):
        raise Refused("unreadable_settings")
    first = messages[0] if messages else {}
    known = [first.get("content", "")] if first.get("role") in ("system", "developer") else []
    if len({text.strip() for text in (*known, *said)}) > 1:
        raise Refused("two_systems")
    return messages if known or not said else [{"role": "system", "content": said[0]}, *messages]


def without_empty(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the nulls that Arrow adds for the keys of other messages, and without empty lists of calls."""
    return {key: part for key, part in message.items() if part is not None and part not in ([], {})}


def left_out(
    prompt: Messages,
    completion: Messages,
    variables: Mapping[str, Any],
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[[Messages, Mapping[str, Any]], str],
) -> list[str]:
    """Names of what is in a conversation and not in the text that the chat template made of it.

    Args:
        text: what `write(prompt + completion, variables)` gives.
        write: renders messages with variables.

    Returns:
        Settings and fields of messages that are of no use to the template, such as a name or a time. To leave out
        reasoning of earlier turns is a template's good right.

    Raises:
        Refused: as `template_leaves_out`, with names, if it is something to be read: tools, documents, whole turns,
            calls of tools, or the reasoning of a completion.
    """

    def makes_no_difference(messages: Messages, fewer: Mapping[str, Any]) -> bool:
        try:
            return write(messages, fewer) == text
        except TEMPLATE_REFUSES:  # which it may once a part is missing
            return False

    whole = prompt + completion
    lost = [
        name
        for name in variables
        if name in SHOWN and makes_no_difference(whole, {key: value for key, value in variables.items() if key != name})
    ]
    for place, message in enumerate(whole):
        others = whole[:place] + whole[place + 1 :]
        if others and message.get("content", "").strip() not in text and makes_no_difference(others, variables):
            lost.append(f"the turn of role {message['role']}")
    unused = [f"{SETTINGS}.{name}" for name in variables if name not in SHOWN and not knows_variable(tokenizer, name)]
    for part, before, after in ((prompt, [], completion), (completion, prompt, [])):
        for names in _fields(part):
            stripped = [{key: value for key, value in message.items() if key not in names} for message in part]
            if not makes_no_difference(before + stripped + after, variables):
                continue
            if names[0] in _CALLS or (names == _REASONING and part is completion):
                lost.append(names[0])
            else:
                unused.append(f"messages.{names[0]}")
    if lost:
        raise Refused("template_leaves_out", f"{', '.join(dict.fromkeys(lost))} in none of what it writes")
    return unused


def require_written_by_trl(dataset: Dataset | IterableDataset, first_row: Mapping[str, Any]) -> None:
    """Refuse rows whose columns TRL, which writes tools and settings itself, would leave out without a word.

    Of a data set that is streamed only the first row is looked at.

    Raises:
        ValueError: naming the column.
    """
    for name in filter(first_row.__contains__, (DOCUMENTS, *SYSTEM, *_MEDIA_BUT_IMAGES)):
        if any(map(has_value, dataset[name] if isinstance(dataset, Dataset) else [first_row[name]])):
            raise ValueError(
                f"the data set has a column {name!r}, which TRL does not write into the prompt. Put it into the "
                "prompt's messages (epsdpo.data.prepared.prepare does so with a system text), or remove the column"
            )


def _fields(messages: Messages) -> Iterator[tuple[str, ...]]:
    """The fields of messages beside role and content; names of the same thing together."""
    found = dict.fromkeys(key for message in messages for key in message if key not in ("role", "content"))
    if any(name in found for name in _REASONING):
        yield _REASONING
    yield from ((name,) for name in found if name not in _REASONING)


def _parsed(value: Any) -> Any:
    """What a text says as JSON, which is how tables keep objects that differ from row to row; None for nothing."""
    if isinstance(value, str) and has_value(value):
        try:
            value = json.loads(value)
        except ValueError:
            raise Refused("unreadable_settings") from None
    return value if has_value(value) else None
