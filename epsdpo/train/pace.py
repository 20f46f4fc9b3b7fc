"""How long a training has yet to go, told only once that can be known."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

ENOUGH, RECENT = 3, 20  # steps; the first alone, which also warms things up, is no measure of the others


def seconds_left(seconds: Iterable[float], measured: int, left: int) -> float | None:
    """Seconds that `left` further optimiser steps will take; None while too few were measured to say.

    Args:
        seconds: per step, of what this process has done; an earlier one, which it continues, may have been slower or
            faster.
        measured: how many steps that were.
    """
    if left == 0:
        return 0.0
    return statistics.median(list(seconds)[-RECENT:]) * left if measured >= ENOUGH else None


def as_time(seconds: float) -> str:
    """Minutes and seconds, as 3:07, and hours before them where there are any."""
    seconds = round(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
