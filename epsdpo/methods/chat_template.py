"""A conversation as a chat template writes it, and the same on every day.

Templates can ask for the time (Llama 3.1 and later write today's date into every system turn). Texts that are trained
on one day and asked on another would differ, so all of the kit renders here, and the day is stated.
"""

from __future__ import annotations

import functools
import re
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

TEMPLATE_REFUSES = (TemplateError, TypeError, ValueError)  # by which a template, or transformers, refuses turns

_CLOCK = "strftime_now"  # by this name templates ask transformers for the time, and no template has another clock
_DIRECTIVES = "aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ"  # what may follow a % in what a template asks for
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")  # what in Jinja draws at random


def render_chat(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    day: str,
    *,
    answer_next: bool = False,
    **variables: Any,
) -> str:
    """The conversation's text, special tokens included.

    Args:
        day: what the template is told when it asks for the time, as 2024-07-26; the hour is midnight.
        answer_next: whether the header of the assistant's next turn is to follow.
        variables: further ones of the template: `tools`, `documents`, and whatever it has of its own.

    Raises:
        One of `TEMPLATE_REFUSES` if the template refuses the turns.
    """
    template = None
    if writes_date(tokenizer):
        template = _clock_that_stands(day) + tokenizer.get_chat_template(tools=variables.get("tools"))
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer_next, chat_template=template, **variables
    )


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the time."""
    return _CLOCK in _source(tokenizer)


def draws_at_random(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template may write the same conversation in several ways, so that none can be relied on."""
    return _RANDOM.search(_source(tokenizer)) is not None


def knows_variable(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the chat template names a variable, so that it makes a difference to set it."""
    return re.search(rf"\b{re.escape(name)}\b", _source(tokenizer)) is not None


@functools.cache
def _clock_that_stands(day: str) -> str:
    """A macro to put before a template, which then goes before transformers' function of the same name.

    A function cannot be handed over: transformers lets templates see plain data only.
    """
    moment = datetime.fromisoformat(day)
    told = {
        f"%{flag}{directive}": moment.strftime(f"%{flag}{directive}") for directive in _DIRECTIVES for flag in ("", "-")
    }
    replaced = "".join(f" | replace({asked!r}, {answer!r})" for asked, answer in told.items())
    # Of what follows a block one line break is dropped: this one, so that the template begins a line as before.
    return f"{{% macro {_CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template's source; of a tokenizer with several templates all of them."""
    template = tokenizer.chat_template or ""
    return template if isinstance(template, str) else "\n".join(template.values())
