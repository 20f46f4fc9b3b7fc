"""A process that has imported what the stages of a batch import, and nothing else, and is forked for each of them.

    python -m epsdpo.batch.warm LISTENER NOTEBOOK... METHOD... < pipe

It imports as a kernel does, so that libraries which ask whether they are in a notebook hear that they are. Of what it
could not hand on, such as a thread or the use of a GPU, it says so, and stages are started anew.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import json
import os
import secrets
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from epsdpo.batch.forked import OF_KERNELS, become_stage
from epsdpo.batch.warm_client import circumstances, same_user
from epsdpo.methods.catalogue import CATALOGUE, code_of, config_class, trainer_class
from epsdpo.runs.reach import PACKAGE, reached

_STAGE = """
import epsdpo.batch.gpus, epsdpo.batch.stage, ipykernel.ipkernel
from epsdpo.batch.notebook_page import exporter
from nbformat.v4 import new_code_cell, new_notebook
exporter().from_notebook_node(new_notebook(cells=[new_code_cell()]))
"""
_OF_EACH = {"_", "SHLVL", "PWD", "OLDPWD", "MPLBACKEND"}  # by the shell that begins a stage, or for kernels alone
_ITS_OWN = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # else a memory pool of pyarrow starts a thread


class WarmProcess:
    """The warm process of a batch, from the side of the runner.

    Attributes:
        address: of its socket, which has no file: none stays behind, and the depth of a run folder does not matter.
    """

    def __init__(self, notebooks: list[Path], methods: list[str], environment: dict[str, str], log: IO[bytes]):
        self.address = f"epsdpo-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{self.address}")
            listener.listen(128)
            command = [sys.executable, "-m", "epsdpo.batch.warm", str(listener.fileno())]
            self._process = subprocess.Popen(
                [*command, *map(str, notebooks), *methods],
                stdin=subprocess.PIPE,  # held open, and it ends when it closes
                stdout=log,
                stderr=log,
                env={**environment, **OF_KERNELS, **_ITS_OWN},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()


def serve(listener: socket.socket, notebooks_and_methods: list[str]) -> Callable[[], None] | None:
    """Import, and fork for who asks, until standard input closes. Returns in forks alone: what they are to do."""
    given = dict(os.environ)
    files = _versions(file for file in PACKAGE.rglob("*") if file.suffix != ".pyc")
    problem = _import(notebooks_and_methods) or _untrusted(listener)
    files |= _versions(Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", "")))
    changed = {name: value for name, value in os.environ.items() if given.get(name) != value}
    gc.collect()
    gc.freeze()  # else forks would copy pages only to look for garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended leave nothing
    while True:
        ready, _, _ = select.select([sys.stdin, listener], [], [])
        if sys.stdin in ready:
            return None
        connection, _ = listener.accept()
        if same_user(connection) and os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                request = _keep(connection, lambda request: problem or _differs(request, given, files))
            except (OSError, ValueError):  # who asked is gone
                os._exit(0)
            return lambda: become_stage(request["command"], request["environment"], changed)
        connection.close()


def _keep(connection: socket.socket, refusal: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Fork a stage, pass signals on to it, and tell how it ended. What was asked for is returned to the stage alone.

    A stage ends at once if its standard input closes, as it does when this process is gone, which goes with the asker.

    Raises:
        OSError, ValueError: if the asker is gone.
    """
    _, outputs, _, _ = socket.recv_fds(connection, 1, 2)
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    if reason := refusal(request):
        connection.sendall(json.dumps({"refused": reason}).encode() + b"\n")
        os._exit(0)
    connection.sendall(b"{}\n")
    end, held = os.pipe()
    stage = os.fork()
    if stage == 0:
        connection.close()
        os.close(held)
        for number, file in enumerate((end, *outputs)):
            os.dup2(file, number)
            os.close(file)
        return request
    ended = os.pidfd_open(stage)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1])
            connection.sendall(f"{code}\n".encode())
            os._exit(0)
        (number,) = connection.recv(1)
        os.kill(stage, number)


def _differs(request: dict[str, Any], given: dict[str, str], files: dict[Path, tuple[int, ...] | None]) -> str:
    """What a stage would find otherwise if it were begun anew; "" if nothing."""
    for what, here in circumstances().items():
        if request[what] != here:
            return f"its {what} is {request[what]}, and {here} in the process kept warm"
    theirs = request["environment"]
    for name in sorted({*given, *theirs} - _OF_EACH - _ITS_OWN.keys()):
        if theirs.get(name) != (None if name in OF_KERNELS else given.get(name)):
            return f"its environment variable {name} is not as in the process kept warm"
    return next((f"{file} has changed" for file, then in _versions(files).items() if then != files[file]), "")


def _versions(files: Iterable[Path]) -> dict[Path, tuple[int, ...] | None]:
    found: dict[Path, tuple[int, ...] | None] = dict.fromkeys(files)
    for file in found:
        with contextlib.suppress(OSError):
            state = file.stat()
            if stat.S_ISREG(state.st_mode):
                found[file] = (state.st_ino, state.st_size, state.st_mtime_ns)
    return found


def _import(notebooks_and_methods: list[str]) -> str:
    """Do the imports of notebooks, and of methods that are found by name; what was odd about them, in words.

    And what each stage works out from the same files: what code its notebook reaches, and the templates of its page.
    """
    methods = [name for name in notebooks_and_methods if name in CATALOGUE]
    with _like_a_kernel() as said:
        try:
            exec(_STAGE, {})
            for name in methods:
                config_class(name)
                trainer_class(name)
            for notebook in map(Path, notebooks_and_methods[: -len(methods) or None]):
                exec("\n".join(_imports(notebook)), {})
                reached(notebook, also=[place for method in methods for place in code_of(method)])
                if select.select([sys.stdin], [], [], 0)[0]:
                    os._exit(0)
        except Exception as error:
            return f"{type(error).__name__} as it imported: {error}"
    return f"an import said {said[0]!r}" if said else ""


def _imports(notebook: Path) -> Iterator[str]:
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.parse("".join(cell["source"])).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    yield ast.unparse(node)


@contextlib.contextmanager
def _like_a_kernel() -> Iterator[list[str]]:
    """Show libraries what they look at as they are imported as it is in a kernel; yields what they say meanwhile."""
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython import get_ipython
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    said: list[str] = []
    shell = ZMQInteractiveShell.__new__(ZMQInteractiveShell)  # a whole one starts threads and takes over the process
    shell.config["IPKernelApp"] = Config()
    streams = sys.stdout, sys.stderr
    InteractiveShell._instance = shell
    builtins.get_ipython, builtins.__IPYTHON__ = get_ipython, True
    sys.stdout, sys.stderr = _Stream("stdout", said), _Stream("stderr", said)
    try:
        yield said
    finally:
        sys.stdout, sys.stderr = streams
        InteractiveShell._instance = None
        del builtins.get_ipython, builtins.__IPYTHON__


class _Stream:
    """For those who keep a stream as they are imported, as logging does: that of the process that they end up in."""

    encoding = "UTF-8"  # a kernel's

    def __init__(self, name: str, said: list[str]):
        self._name, self._said = name, said

    def write(self, text: str) -> int:
        if getattr(sys, self._name) is self:
            self._said.append(text)
        return self.__getattr__("write")(text)

    def __getattr__(self, attribute: str) -> Any:
        current = getattr(sys, self._name)
        return getattr(getattr(sys, f"__{self._name}__") if current is self else current, attribute)


def _untrusted(listener: socket.socket) -> str:
    """Why forks of this process would not be as processes begun anew; "" if they would."""
    if threads := len([*Path("/proc/self/task").iterdir()]) - 1:
        return f"imports have started {threads} threads"
    known = {0, 1, 2, listener.fileno()}
    own = f"/proc/{os.getpid()}/fd"
    links = [link for link in Path(own).iterdir() if int(link.name) not in known]
    opened = [file for link in links if os.path.lexists(link) and (file := str(link.readlink())) != own]
    if opened:
        return f"imports have opened {opened[0]}"
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return "imports have begun to use a GPU"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"this system cannot wait for a process by a file ({error.strerror})"
    return ""


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _listener:
        _become = serve(_listener, sys.argv[2:])
    if _become is not None:
        _become()
