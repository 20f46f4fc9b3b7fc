"""How tests wait for other processes."""

import time

import psutil


def wait_until(condition, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run still; one that has ended but was not yet collected by its parent does not."""

    def runs(process):
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [process for process in processes if runs(process)]
