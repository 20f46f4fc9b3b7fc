"""Text of others: what UTF-8 cannot write is replaced, or refused, where it comes in and before it is kept.

JSON, YAML and a command line can all express half of a surrogate pair, such as "\\ud83d", the first half of an emoji
that was cut. Python keeps it as text, and no file in UTF-8, no Parquet table, tokenizer or figure takes it.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def writable(value: Any) -> Any:
    """The value with U+FFFD for each half of a surrogate pair, and halves that belong together joined.

    Looks into lists, tuples (which become lists) and dictionaries, keys included; all else stays as it is.
    """
    if isinstance(value, str):
        if is_writable(value):
            return value
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {writable(key): writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    return value


def is_writable(text: str) -> bool:
    """Whether UTF-8 can write a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def texts_in(value: Any, at: tuple = ()) -> Iterator[tuple[tuple, str]]:
    """Each text in nested lists and mappings, keys included, with the keys and places that lead to it."""
    if isinstance(value, str):
        yield at, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_in(key, (*at, key))
            yield from texts_in(item, (*at, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from texts_in(item, (*at, number))
