"""A server's key: read from the environment, sent in one header, and cut out of all that is kept or printed.

In whatever form a server repeats it: escaped, in base64, across lines.
"""

import base64
import html
import os
import re
import urllib.parse
from typing import Any

from epsdpo.methods.errors import ConfigError

HIDDEN = "***"
_WHOLLY_HIDDEN = "*** (not shown, since it holds the key)"

# Shorter ones are the placeholders of servers that check none, such as "-"; any text may hold them by chance.
_SHORTEST_HIDDEN = 4

# What may stand within a key that was broken into lines, as such or escaped.
_BREAK = r"(?:[\x00-\x20\x7f-\xa0]|\\+[abfnrtv0]|\\+(?:u00|x)[01][0-9a-f]|%[01][0-9a-f]|<br ?/?>)*"
_PLAIN_BREAKS = re.compile(r"[\x00-\x20\x7f-\xa0]+|<br ?/?>", re.IGNORECASE)
_ESCAPED = re.compile(r"\\+(?:u00|x)([0-9a-f]{2})|\\+([abfnrtv0])|\\+(.)", re.IGNORECASE)
_DEEPEST = 8  # escapes within each other


class ApiKey:
    """A key, or None for a server that needs none."""

    def __init__(self, value: str | None = None):
        self._value = value
        self._forms: re.Pattern | None = None
        if value is not None and len(value) >= _SHORTEST_HIDDEN:
            in_base64 = list(_in_base64(value))
            characters = [map(_character, value), *(map(re.escape, text) for text in in_base64)]
            self._forms = re.compile("|".join(map(_BREAK.join, characters)), re.IGNORECASE)
            self._readings = {reading for text in (value, *in_base64) for reading in _readings(text)}

    @classmethod
    def from_environment(cls, variable: str | None, place: str) -> "ApiKey":
        """The key that an environment variable holds, without white space around it.

        Args:
            variable: its name; None for no key.
            place: where a config names it, for messages, which never hold the value.

        Raises:
            ConfigError: if it is not set, or holds what no HTTP header may.
        """
        if variable is None:
            return cls()
        value = os.environ.get(variable, "").strip()
        if not value:
            raise ConfigError(
                f"{place} names {variable}, which is not set. Set it in the environment to the server's key, or remove "
                "api_key_env from the config for a server that needs none"
            )
        require_sendable(value, f"{place} names {variable}, whose value")
        return cls(value)

    @property
    def headers(self) -> dict[str, str]:
        """What to send."""
        return {} if self._value is None else {"Authorization": f"Bearer {self._value}"}

    def hide(self, text: str) -> str:
        """A text without the key: plain or escaped in any way, in base64, in whatever letters, broken into lines.

        Of a text that holds it in one escape within another, nothing is left.
        """
        if self._forms is None:
            return text
        text = self._forms.sub(HIDDEN, text)
        read = _readings(text)
        return _WHOLLY_HIDDEN if any(key in reading for reading in read for key in self._readings) else text

    def hide_in(self, value: Any) -> Any:
        """What was read from JSON, with the key hidden in all its texts and names."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(item) for name, item in value.items()}
        return value

    def __repr__(self) -> str:
        return "ApiKey()" if self._value is None else f"ApiKey({HIDDEN})"


def require_sendable(value: str, what: str) -> None:
    """Refuse a key that cannot be sent: the HTTP client would quote it whole in its complaint.

    Raises:
        ConfigError: beginning with `what`, and without the value.
    """
    if all(" " <= character <= "~" for character in value):
        return
    found = "a character that is not ASCII" if not value.isascii() else "a line break or another control character"
    raise ConfigError(
        f"{what} holds {found}, which no HTTP header may. Set it again, as one line with nothing but the key in it"
    )


def _character(character: str) -> str:
    """A regular expression for a character of a key: itself, or as JSON, Python, a URL or a page writes it."""
    code = ord(character)
    forms = [
        re.escape(character),
        rf"\\+(?:u00|x){code:02x}",
        f"%{code:02x}",
        f"&#(?:0*{code}|x0*{code:x});",
        re.escape(html.escape(character)),
    ]
    if not character.isalnum():
        forms.append(r"\\+" + re.escape(character))
    return f"(?:{'|'.join(dict.fromkeys(forms))})"


def _in_base64(key: str) -> list[str]:
    """What is sure to be in whatever holds the key in base64, with the letters of URLs or without.

    How many bytes stand before the key decides on which of three ways it is written.
    """
    texts = []
    for before in range(3):
        text = base64.b64encode(bytes(before) + key.encode()).decode()
        text = text[-(-8 * before // 6) : 8 * (before + len(key)) // 6]
        texts += [text, text.replace("+", "-").replace("/", "_")]
    return texts


def _readings(text: str) -> set[str]:
    """A text without line breaks, with more and more of its escapes undone."""
    readings: set[str] = set()
    for _ in range(_DEEPEST):
        text = _PLAIN_BREAKS.sub("", text)
        if text.casefold() in readings:
            break
        readings.add(text.casefold())
        text = _ESCAPED.sub(_unescaped, html.unescape(urllib.parse.unquote(text, errors="replace")))
    return readings


def _unescaped(escape: re.Match) -> str:
    code, blank, character = escape.groups()
    return chr(int(code, 16)) if code else "" if blank else character
