"""How long to wait before a request is repeated. Whether it is worth repeating is left to the caller."""

import math
import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


def retry_after_seconds(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for, given as such or as a date; None if it says neither.

    They are infinite where it asks for a moment that no clock here can tell.
    """
    if header is None:
        return None
    try:
        seconds = float(header)
        return None if math.isnan(seconds) else max(0.0, seconds)
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def backoff_seconds(base: float, attempt: int, longest: float, generator: random.Random) -> float:
    """Wait after attempt 0, 1, …: base · 2^attempt on average, at most `longest`.

    It is drawn between half and one and a half of that, so that requests refused together do not come back together.
    """
    return min(longest, base * 2.0**attempt * generator.uniform(0.5, 1.5))
