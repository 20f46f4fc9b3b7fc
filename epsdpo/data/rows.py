"""What makes a row a usable preference pair: the formats it may come in, the checks it must pass, and its tokens."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from epsdpo.data.sources import PAIR_COLUMNS, DataError, Rows
from epsdpo.files import texts_in
from epsdpo.methods import beside
from epsdpo.methods.beside import (
    SETTINGS,
    SHOWN,
    Messages,
    Refused,
    left_out,
    template_variables,
    with_system,
    without_empty,
)
from epsdpo.methods.chat_template import TEMPLATE_REFUSES, draws_at_random, render_chat

STANDARD = "standard"
CONVERSATIONAL = "conversational"
WHOLE_CONVERSATIONS = "conversational, prompt inside the conversations"
TRANSCRIPTS = "transcripts in the manner of Anthropic HH"

# Why a row may be refused. The first reason that applies is the one counted.
REFUSALS = {
    "missing_value": "a column is null",
    "wrong_type": "a value is not of the data's format, or not valid Unicode text",
    "not_a_transcript": "chosen or rejected does not start with a Human: or Assistant: header",
    "no_assistant_turn": "chosen or rejected does not begin and end with the assistant",
    "prompts_differ": "chosen and rejected answer different prompts",
    "empty_prompt": "the prompt has no text, or none of its tokens is left in front of both completions",
    "empty_chosen": "the chosen response has no text",
    "empty_rejected": "the rejected response has no text",
    "identical_pair": "chosen and rejected are the same text or the same tokens",
    **beside.REFUSALS,
    "template_refuses": "the chat template raises an error on these turns",
    "two_bos": "the tokens start with two BOS: the text or the chat template writes one where there is one already",
    "prompt_fills_max_length": "the prompt alone fills max_length, so that nothing of a completion would be left",
}

_COMPLETIONS = ("chosen", "rejected")
_HEADER = re.compile(r"\n\n(Human|Assistant):")
_JSON_LIST = re.compile(r"\s*\[\s*\{")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """A prompt and its two completions: texts, or lists of messages with `role` and `content`.

    `variables` are the chat template's: tools, documents, settings of the row's own.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """The texts that are tokenised: the prompt alone, and with either completion behind it.

    `unused` names settings and fields of messages that are of no use to the chat template.
    """

    prompt: str
    with_chosen: str
    with_rejected: str
    unused: tuple[str, ...] = ()

    def parts(self) -> tuple[str, str, str]:
        """Prompt, chosen and rejected as a reader would divide them: completions start where the three texts part."""
        prompt = _common_prefix(self.prompt, self.with_chosen, self.with_rejected)
        return prompt, self.with_chosen[len(prompt) :], self.with_rejected[len(prompt) :]


@dataclass(frozen=True)
class Tokens:
    """Token ids of one pair. `lost_prompt` ids at the end of the prompt's own rendering are in no sequence."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    lost_prompt: list[int]


def detect_format(rows: Rows) -> str | None:
    """Tell the format from the columns and the first row without nulls; None if they make no format (no prompt).

    Rows of another format than the first are refused later, one by one, as `wrong_type`.
    """
    has_prompt = "prompt" in rows.columns
    columns = [column for column in PAIR_COLUMNS if column in rows.columns]
    first = next((row for row in rows.values if all(row[column] is not None for column in columns)), None)
    if first is not None and isinstance(first["chosen"], list):
        return CONVERSATIONAL if has_prompt and isinstance(first["prompt"], list) else WHOLE_CONVERSATIONS
    if has_prompt:
        return STANDARD
    is_transcript = (isinstance(row["chosen"], str) and _HEADER.match(row["chosen"]) for row in rows.values)
    return TRANSCRIPTS if any(is_transcript) else None


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, data_format: str) -> None:
    """Refuse a tokenizer that cannot write this format.

    Raises:
        DataError: naming the tokenizer and the remedy.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    if data_format != STANDARD:
        if tokenizer.chat_template is None:
            raise DataError(
                f"{name} has no chat template, but the data are conversations ({data_format}). Name one in "
                "model.chat_template (a .jinja file, or a model that has one), or use an instruction-tuned model"
            )
        if draws_at_random(tokenizer):
            raise DataError(
                f"the chat template of {name} draws at random (`random` or `lipsum`), so that the same conversation "
                "reads otherwise each time. Take that out in a copy of it, and name the copy in model.chat_template"
            )
    elif tokenizer.eos_token is None:
        raise DataError(f"{name} has no EOS token to end a completion with. Set eos_token in its tokenizer_config.json")
    elif tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise DataError(
            f"{name} ends every text with EOS, prompts too. Set add_eos_token to false in its tokenizer_config.json"
        )


# ------------------------------------------------------------------------------------------------- rows into pairs


def read_pair(row: dict[str, Any], data_format: str) -> Pair:
    """The pair of one row.

    Raises:
        Refused: with the first reason, of those that show before tokenisation, why the row cannot be used.
    """
    needed = ("chosen", "rejected") if data_format in (WHOLE_CONVERSATIONS, TRANSCRIPTS) else ("prompt", *_COMPLETIONS)
    pair_id = row.get("pair_id", "")
    for column in ("pair_id", *needed):
        if row.get(column, "") is None:
            raise Refused("missing_value", f"{column} is null")
    if not isinstance(pair_id, str | int):
        raise Refused("wrong_type", f"pair_id is {described(pair_id)}, and should be text or a whole number")
    if isinstance(pair_id, str):
        checked_text(pair_id, "pair_id")
    if data_format == STANDARD:
        pair = Pair(*(plain_text(row[column], column) for column in needed))
    elif data_format == CONVERSATIONAL:
        pair = Pair(*(checked_messages(row[column], column) for column in needed))
    else:
        turns = transcript_turns if data_format == TRANSCRIPTS else checked_messages
        pair = _split_conversations(turns(row["chosen"], "chosen"), turns(row["rejected"], "rejected"))
        if not pair.prompt and row.get("prompt"):
            raise Refused(
                "wrong_type",
                f"prompt is {described(row['prompt'])}, and chosen and rejected are messages without it. It should be "
                "a list of messages too, [{role: user, content: …}]",
            )
    pair = _with_what_it_brings(pair, row)
    for part in ("prompt", *_COMPLETIONS):
        if _is_blank(getattr(pair, part)):
            raise Refused(f"empty_{part}")
    if data_format == CONVERSATIONAL and any(
        completion[end]["role"] != "assistant" for completion in (pair.chosen, pair.rejected) for end in (0, -1)
    ):
        raise Refused("no_assistant_turn")
    if pair.chosen == pair.rejected:
        raise Refused("identical_pair")
    return pair


def _with_what_it_brings(pair: Pair, row: dict[str, Any]) -> Pair:
    """The pair with the variables and the system turn that further columns of its row state."""
    variables = template_variables(row)
    if not isinstance(pair.prompt, str):
        return replace(pair, prompt=with_system(pair.prompt, row), variables=variables)
    if with_system([], row) or any(name in variables for name in SHOWN):
        raise Refused("needs_template")
    return replace(pair, variables=variables)


def repeats_prompt(row: dict[str, Any], pair: Pair) -> bool:
    """Whether the `prompt` text beside whole conversations, which is not used, says what their first user turn says."""
    first = next((message["content"] for message in pair.prompt if message["role"] == "user"), None)
    return first is not None and isinstance(row["prompt"], str) and row["prompt"].strip() == first.strip()


def checked_text(value: Any, where: str) -> str:
    """The value, if it is text that a tokenizer accepts; `where` names it in messages.

    Raises:
        Refused: as `wrong_type`.
    """
    if not isinstance(value, str):
        raise Refused("wrong_type", f"{where} is {described(value)}, and should be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can express and no tokenizer accepts
        raise Refused(
            "wrong_type", f"{where} is not valid Unicode: its character {error.start} is half of a surrogate pair"
        ) from None
    return value


def plain_text(value: Any, column: str) -> str:
    """`checked_text` that is no JSON of messages, which would be trained as it stands.

    Raises:
        Refused: as `wrong_type`.
    """
    text = checked_text(value, column)
    if messages_in_json(text):
        raise Refused("wrong_type", f"{column} is {described(text)}, and should be that list itself (json.loads)")
    return text


def messages_in_json(value: Any) -> bool:
    """Whether a value is the JSON text of a list of messages."""
    if not isinstance(value, str) or not _JSON_LIST.match(value):
        return False
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return bool(parsed) and all(
        isinstance(item, dict) and any(keys <= set(item) for keys in ({"role", "content"}, {"from", "value"}))
        for item in parsed
    )


def checked_messages(value: Any, where: str) -> Messages:
    """Messages with role and content, without the nulls that Arrow adds for the keys of other messages.

    A message may call tools in place of a content. `where` names the value in messages.

    Raises:
        Refused: as `wrong_type`.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Refused(
            "wrong_type", f"{where} is {described(value)}, and should be a list of messages with role and content"
        )
    messages = [without_empty(message) for message in value]
    for number, message in enumerate(messages):
        place = f"{where}, message {number},"
        content = message.get("content", "" if "tool_calls" in message else None)
        if "role" not in message or content is None:
            hint = " (from: human is role: user, from: gpt is role: assistant)" if "from" in message else ""
            raise Refused("wrong_type", f"{place} is {described(message)}, and should have role and content{hint}")
        checked_text(message["role"], f"{place} role")
        if isinstance(content, list):
            raise Refused(
                "wrong_type",
                f"{place} content is {described(content)}, that is parts, and should be one text: join them",
            )
        checked_text(content, f"{place} content")
        for at, text in texts_in(message):
            checked_text(text, " ".join(map(str, (place, *at))))
    return messages


def described(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "the JSON text of a list of messages" if messages_in_json(value) else "text"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, list):
        kinds = list(dict.fromkeys(described(item) if isinstance(item, dict | list) else _kind(item) for item in value))
        return f"a list of {' and '.join(kinds[:2])}" if kinds else "an empty list"
    return f"{str(value)[:40]} ({type(value).__name__})"


def _kind(value: Any) -> str:
    return {"str": "texts", "NoneType": "nulls"}.get(type(value).__name__, type(value).__name__)


def transcript_turns(value: Any, where: str) -> Messages:
    """The turns of "\\n\\nHuman: ... \\n\\nAssistant: ...", without the headers and the space around them.

    Raises:
        Refused: as `wrong_type` or `not_a_transcript`.
    """
    before, *parts = _HEADER.split(checked_text(value, where))
    if before.strip() or not parts:
        raise Refused("not_a_transcript")
    return [
        {"role": _ROLES[header], "content": content.strip()}
        for header, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _split_conversations(chosen: Messages, rejected: Messages) -> Pair:
    """The last turn of each conversation is the completion, the turns before it are the prompt of both."""
    if any(not turns or turns[-1]["role"] != "assistant" for turns in (chosen, rejected)):
        raise Refused("no_assistant_turn")
    if chosen[:-1] != rejected[:-1]:
        raise Refused("prompts_differ")
    return Pair(chosen[:-1], chosen[-1:], rejected[-1:])


def _is_blank(part: str | Messages) -> bool:
    if isinstance(part, str):
        return not part.strip()
    return not any(message.get("content", "").strip() or "tool_calls" in message for message in part)


# ------------------------------------------------------------------------------------------------ pairs into tokens


def render(pair: Pair, tokenizer: PreTrainedTokenizerBase, day: str) -> Rendered:
    """The texts to tokenise: through the chat template, or plain with EOS behind completions that lack it.

    After a template nothing is appended: it ends the turn itself, and the second EOS that trl 0.13 put there is a token
    no model sees when it answers.

    Args:
        day: what the template is told when it asks for today's date.

    Raises:
        Refused: if the chat template raises an error, or leaves out what the model should read.
    """
    if isinstance(pair.prompt, str):
        chosen, rejected = (
            text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
            for text in (pair.chosen, pair.rejected)
        )
        unused = tuple(f"{SETTINGS}.{name}" for name in pair.variables)
        return Rendered(pair.prompt, pair.prompt + chosen, pair.prompt + rejected, unused)

    def write(messages: Messages, variables: Mapping[str, Any]) -> str:
        return render_chat(messages, tokenizer, day, **variables)

    try:
        prompt = render_chat(pair.prompt, tokenizer, day, answer_next=True, **pair.variables)
        texts = [write(pair.prompt + completion, pair.variables) for completion in (pair.chosen, pair.rejected)]
    except TEMPLATE_REFUSES as error:
        raise Refused("template_refuses", str(error)) from error
    unused = [
        name
        for completion, text in zip((pair.chosen, pair.rejected), texts, strict=True)
        for name in left_out(pair.prompt, completion, pair.variables, text, tokenizer, write)
    ]
    return Rendered(prompt, *texts, tuple(dict.fromkeys(unused)))


def tokenise(batch: list[Rendered], tokenizer: PreTrainedTokenizerBase, *, templated: bool) -> list[Tokens]:
    """Token ids of a batch of pairs, by the rule of TRL 1.16.

    Prompt and prompt + completion are tokenised apart from each other. The completion is what follows the tokens that
    all three share, which are the prompt's unless a template renders it differently on its own, or tokens merge across
    the boundary.

    Args:
        batch: the texts.
        tokenizer: the model's tokenizer.
        templated: whether a chat template wrote the texts, special tokens included, so that none is to be added.
    """
    texts = [text for pair in batch for text in (pair.prompt, pair.with_chosen, pair.with_rejected)]
    ids = tokenizer(texts, add_special_tokens=not templated, verbose=False)["input_ids"] if texts else []
    tokens = []
    for prompt, with_chosen, with_rejected in zip(ids[::3], ids[1::3], ids[2::3], strict=True):
        shared = len(_common_prefix(prompt, with_chosen, with_rejected))
        tokens.append(Tokens(prompt[:shared], with_chosen[shared:], with_rejected[shared:], prompt[shared:]))
    return tokens


def check_tokens(tokens: Tokens, bos: int | None) -> None:
    """Refuse a pair whose texts were fine and whose tokens are not.

    Only the start is searched for BOS: some models use one token for BOS and EOS, and some templates put a BOS before
    every turn.

    Raises:
        Refused: with the reason.
    """
    for part in ("prompt", *_COMPLETIONS):
        if not getattr(tokens, part):
            said = "it has text, which is written otherwise once it is answered: none of its tokens is in front of both"
            raise Refused(f"empty_{part}", said if part == "prompt" and tokens.lost_prompt else "")
    if tokens.chosen == tokens.rejected:
        raise Refused("identical_pair")
    if bos is not None and tokens.prompt[:2] == [bos, bos]:
        raise Refused("two_bos")


def cut_prompt(prompt: list[int], max_prompt_length: int | None) -> list[int]:
    """The last `max_prompt_length` tokens, as in the paper's runs (trl 0.13). A BOS goes with what is cut off."""
    return prompt if max_prompt_length is None else prompt[-max_prompt_length:]


def _common_prefix(*sequences):
    # Meant for paths, but it compares any strings or lists, at the speed of one comparison of the extremes.
    return os.path.commonprefix(sequences)
