"""What a server answered, read so that no answer can do harm: as text, as JSON, or as a problem in words.

Bodies may be packed, oversized or malformed, and hold numbers and nesting that Python cannot take.
"""

import json
import zlib
from typing import Any

import httpx

from epsdpo.models.api_key import ApiKey

LARGEST_BYTES = 8 * 2**20  # of a body after unpacking; a completion with log-probabilities has some thousand
DEEPEST = 64  # lists and objects within each other; a completion has about ten

# A packed body can hold a thousand times its size, and one that is packed twice a million times.
HEADERS = {"Accept-Encoding": "identity"}

# What the HTTP client raises for servers that are not there, break off, or do not speak HTTP, and for addresses that
# only show at sending that there can be no such host.
CONNECTION_ERRORS = (httpx.RequestError, httpx.InvalidURL, UnicodeError)

_SHOWN = 2000  # characters
_LOOKED_AT = 32_000  # bytes


class BadAnswer(Exception):
    """An answer that cannot be read.

    Attributes:
        reason: a few words, the same for answers of one kind.
        detail: what exactly came back.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class ServerAnswer:
    """One answer, put together from the parts of its body as the network brings them: `response.iter_raw()`.

    Everything that is read from it is without the key.
    """

    def __init__(self, response: httpx.Response, key: ApiKey):
        self.status = response.status_code
        self._headers, self._key = response.headers, key
        self._content = bytearray()
        packed = self._headers.get("Content-Encoding", "").strip().lower()
        if packed not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise BadAnswer("answer cannot be unpacked", f"its Content-Encoding is {key.hide(packed)[:100]!r}")
        # Either of the two forms, whichever the header names; servers mix them up.
        self._unpacker = None if packed in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)

    def add(self, part: bytes) -> None:
        """Take the next part of the body, as it came.

        Raises:
            BadAnswer: if the body is too large, before it is in memory, or cannot be unpacked.
        """
        if self._unpacker is not None:
            try:
                part = self._unpacker.decompress(part, LARGEST_BYTES + 1 - len(self._content))
            except zlib.error as error:
                raise BadAnswer("answer cannot be unpacked", str(error)) from error
        self._content += part
        if len(self._content) > LARGEST_BYTES:
            raise BadAnswer("answer is too large", f"more than {LARGEST_BYTES // 2**20} MiB, unpacked")

    def text(self) -> str:
        """The beginning of the body, for people.

        As UTF-8, whatever character set the server names: JSON is always in that, and Python knows character sets that
        unpack or evaluate.
        """
        text = self._key.hide(bytes(self._content[:_LOOKED_AT]).decode("utf-8", "replace"))
        # The end of a part may be the beginning of a key.
        return (text if len(self._content) <= _LOOKED_AT else text[:-_SHOWN])[:_SHOWN]

    def json(self) -> Any:
        """The body as JSON. A whole number that no count can be is a float, which is infinite beyond 1e308.

        Raises:
            BadAnswer: if it is none, or nested beyond reason.
        """
        if self._unpacker is not None and not self._unpacker.eof:
            raise BadAnswer("answer cannot be unpacked", "it ends too early")
        try:
            value = json.loads(bytes(self._content), parse_int=_integer)
            if _depth_exceeds(value, DEEPEST):
                raise RecursionError
            return self._key.hide_in(value)
        except RecursionError as error:
            raise BadAnswer("answer is nested too deeply", self.text()) from error
        except ValueError as error:
            raise BadAnswer("answer is not JSON", f"{error}: {self.text()}") from error

    def retry_after(self) -> str | None:
        """What the server says of when to ask again, None if it does not."""
        return self._headers.get("Retry-After")

    def redirection(self) -> str:
        """Where an answer points that is a redirection, which no client follows: the key would go there."""
        return self._key.hide(self._headers.get("Location", "another address"))[:200]


def tokens_counted(body: dict[str, Any]) -> dict[str, int]:
    """`prompt_tokens` and `completion_tokens` of a completion, as far as the server states them as counts."""
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    return {
        name: counts[name]
        for name in ("prompt_tokens", "completion_tokens")
        if type(counts.get(name)) is int and counts[name] >= 0
    }


def shortened(value: Any) -> str:
    """What came back, for people."""
    return (value if isinstance(value, str) else repr(value))[:_SHOWN]


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 18 else float(digits)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects lie within each other more than `limit` deep."""
    level = [value]
    for _ in range(limit):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True
