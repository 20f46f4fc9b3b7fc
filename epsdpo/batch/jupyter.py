"""A notebook executed by a kernel of this very interpreter, and what went wrong with it in words."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from epsdpo.batch.forked import OF_KERNELS, start_kernel
from epsdpo.runs.preempted import Preempted, told_to_end

_TRACEBACK_LINES = 12
_STARTS = 3


class _Client(AsyncKernelClient):
    """Removes the file with the key to the kernel once both ends have read it, so that no kill leaves it behind."""

    async def wait_for_ready(self, timeout: float | None = None) -> None:
        await super().wait_for_ready(timeout)
        Path(self.connection_file).unlink(missing_ok=True)


class _OwnKernelManager(AsyncKernelManager):
    """Starts the kernel of this very interpreter, whatever kernelspecs the user has installed under whatever name."""

    key_file_prefix: str  # of the stage
    kernels: list[int]  # process ids of those that were started

    @default("client_factory")
    def _removes_the_key(self) -> type:
        return _Client

    @default("connection_file")
    def _key_file_of_the_stage(self) -> str:
        handle, name = tempfile.mkstemp(prefix=self.key_file_prefix, suffix=".json")
        os.close(handle)
        return name

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(), env=OF_KERNELS)

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        """In a fork of the batch's warm process, if this stage is one: for its first start."""
        kernel = start_kernel(kernel_cmd, options["env"], options.get("cwd"))
        if kernel is None:
            await super()._async_launch_kernel(kernel_cmd, **options)
        else:
            self.provisioner.process = kernel
            self.provisioner.pid = self.provisioner.pgid = kernel.pid
            self._reconcile_connection_info(self.provisioner.connection_info)
        self.kernels.append(self.provisioner.pid)

    @default("transport_encryption")
    def _encrypt_where_possible(self) -> str:
        # Without it ipykernel warns in every log that the connection is open to other users of the machine.
        return "auto"


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> str | None:
    """Run all cells, saving as they finish, and return what went wrong, or None.

    When this process is told to end, the kernel is. A training in it may then save a checkpoint; else it just ends, and
    this process with it.

    Raises:
        Preempted: if it did save one.
    """
    kernels: list[int] = []
    told = False
    ends = signal.getsignal(signal.SIGTERM)

    def pass_on() -> None:
        nonlocal told
        told = True
        if kernels:
            with contextlib.suppress(ProcessLookupError):
                os.kill(kernels[-1], signal.SIGTERM)
        else:
            signal.signal(signal.SIGTERM, ends)
            os.kill(os.getpid(), signal.SIGTERM)

    with told_to_end(pass_on):
        problem = _execute(notebook, executed, parameters, kernels)
    if told and problem is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(kernels[-1], signal.SIGKILL)  # what the kernel has started
        os.kill(os.getpid(), signal.SIGTERM)
    return problem


def _execute(notebook: Path, executed: Path, parameters: dict[str, Any], kernels: list[int]) -> str | None:
    prefix = f"epsdpo-kernel-{hashlib.sha256(os.fsencode(executed.resolve())).hexdigest()[:16]}-"
    for left_over in Path(tempfile.gettempdir()).glob(f"{prefix}*.json"):  # of a process killed as its kernel started
        with contextlib.suppress(OSError):
            left_over.unlink()
    manager = type("_KernelManager", (_OwnKernelManager,), {"key_file_prefix": prefix, "kernels": kernels})
    for attempt in range(1, _STARTS + 1):
        try:
            result = papermill.execute_notebook(
                _literal(notebook),
                _literal(executed),
                parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                kernel_manager_class=manager,
                iopub_timeout=60,  # seconds; nbclient's 4 are too few for a figure to arrive on a busy machine
            )
            break
        except PapermillExecutionError as error:
            if error.ename == Preempted.__name__:
                raise Preempted(error.evalue) from None
            lines = strip_ansi("\n".join(error.traceback)).splitlines()[-_TRACEBACK_LINES:]
            return "\n".join([f"{error.ename}: {error.evalue}", *lines])
        except DeadKernelError:
            return (
                "its kernel was killed from outside. Most often the machine ran out of memory: free some, or use "
                "smaller batches, a shorter max_length or a smaller model"
            )
        except RuntimeError as error:
            # No cell has run. The kernel's ports are chosen before it binds them, and another process may be faster.
            if attempt == _STARTS:
                return f"its kernel did not start, {attempt} times: {error}"
            print(f"the kernel did not start ({error}); once more", file=sys.stderr, flush=True)
    if result.metadata.papermill.get("exception"):
        # papermill takes sys.exit(0) for success although the cells after it were not run.
        return "a cell left the notebook early by exit(); let it run to its last cell"
    return None


def _literal(path: Path) -> str:
    """A path for papermill, which fills in what stands in braces, and to which a dash at the beginning means a pipe."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")
