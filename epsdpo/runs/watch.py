"""How a process notices that the one it works for is gone."""

import os
import sys
import threading
from collections.abc import Callable

ORPHANED = 4  # exit code


def end_with_stdin(first: Callable[[], None] | None = None) -> None:
    """From now on, end this process at once when its standard input closes.

    A process that holds the other end of that pipe, and has given it to nobody, thus takes with it what it started,
    and what inherited the pipe from that, however it ends itself: no signal has to reach them, and no process id can be
    mistaken.

    Args:
        first: what is done before, in a thread.
    """

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        if first is not None:
            first()
        os._exit(ORPHANED)

    threading.Thread(target=wait, daemon=True).start()
