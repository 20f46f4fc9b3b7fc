"""What a fork of the warm process does to be like a process that was started for a stage, or for its kernel."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
from io import TextIOWrapper
from pathlib import Path

# What a kernel is given in its environment.
OF_KERNELS = {
    # So that an MPLBACKEND=Agg of the caller's shell does not swallow the figures.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    # tqdm recommends widgets, which would stand still in a page.
    "PYTHONWARNINGS": "ignore:IProgress not found",
}

_waiting: tuple[ForkedKernel, socket.socket] | None = None


class ForkedKernel:
    """A child process, as jupyter_client asks for it: with what it uses of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._waited(os.WNOHANG)

    def wait(self) -> int | None:
        return self._waited(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def become_stage(command: list[str], environment: dict[str, str], by_imports: dict[str, str]) -> None:
    """Do a stage as `python -m epsdpo stage ...` does, and first of all fork what may become its kernel.

    Args:
        by_imports: what was set in the environment by the imports of notebooks, which a kernel does not do again.
    """
    global _waiting
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_kernel(its, by_imports)
    else:
        its.close()
        _waiting = (ForkedKernel(pid), ours)
        _run(command, environment)


def start_kernel(command: list[str], environment: dict[str, str], folder: str | None) -> ForkedKernel | None:
    """Make the fork that waits for it this process's kernel; None if there is none, no more, or it was killed."""
    global _waiting
    if _waiting is None:
        return None
    (kernel, channel), _waiting = _waiting, None
    with channel:
        # With its parent's number a kernel sees to it that it ends with that.
        environment = {**environment, "JPY_PARENT_PID": str(os.getpid())}
        try:
            channel.sendall(json.dumps([command, environment, folder]).encode())
        except OSError:
            return None
    return kernel


def _become_kernel(channel: socket.socket, by_imports: dict[str, str]) -> None:
    os.setsid()  # the kernel and what it starts are interrupted together
    with channel, channel.makefile("rb") as file:
        told = file.read()
    if not told:
        os._exit(0)  # the stage needed no kernel
    command, environment, folder = json.loads(told)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if folder is not None:
        os.chdir(folder)
    _run(command, {**environment, **by_imports})


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run the module of a command line `python ... -m MODULE ARGUMENTS`, as a process begins that was started by it."""
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    _open_streams()
    # Forks would draw the same numbers; `random` sees to itself.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()
    _show_command(command)
    module = command.index("-m") + 1
    sys.orig_argv[:] = command
    sys.argv[:] = command[module:]
    runpy.run_module(command[module], run_name="__main__", alter_sys=True)


def _open_streams() -> None:
    """Standard streams for what the process has been given as such, which may be pipes where there were files."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, f"__{name}__")
        file = open(number, "wb" if number else "rb", 0 if old.write_through else -1, closefd=False)  # noqa: SIM115
        getattr(file, "raw", file).name = f"<{name}>"
        # A command of this kit has changed how `stdout` treats what it cannot write.
        errors = sys.__stdin__.errors if name == "stdout" else old.errors
        stream = TextIOWrapper(file, old.encoding, errors, "\n", old.line_buffering, old.write_through)
        stream.mode = old.mode
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _show_command(command: list[str]) -> None:
    """Have `ps` and the like show a command line for this process, as far as there is room in its own."""
    with contextlib.suppress(OSError):
        begin, end = map(int, Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[45:47])
        text = b"\0".join(os.fsencode(part) for part in command)[: end - begin - 1]
        with Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(begin)
            memory.write(text.ljust(end - begin, b"\0"))
