"""Being told to end soon, with time to save what there is: SIGTERM, or SIGUSR1, as clusters send before they kill."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"

_SIGNALS = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Preempted(RuntimeError):
    """A training that was told to end, and has saved a checkpoint from which the same command goes on."""


@contextmanager
def told_to_end(then: Callable[[], None]) -> Iterator[None]:
    """Within the block, call `then` when this process is told to end, and once: a cluster tells all processes of a job,
    of which some pass it on to others.

    Only the main thread can be told; in another, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = False

    def once(*_: object) -> None:
        nonlocal told
        if not told:
            told = True
            then()

    before = {number: signal.signal(number, once) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
