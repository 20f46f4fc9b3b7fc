"""What a command of this kit sees to before anything else: a Python that has the packages, open files, and output.

It imports nothing but the standard library, and runs on Pythons that are too old for the rest.
"""

import contextlib
import importlib.util
import os
import stat
import sys
from pathlib import Path

MODULES = (
    "accelerate",
    "datasets",
    "filelock",
    "peft",
    "psutil",
    "pydantic",
    "rich",
    "torch",
    "transformers",
    "trl",
    "yaml",
)
OLDEST_PYTHON = (3, 11)
OPEN_FILES = 256  # a stage holds about a hundred: its kernel's sockets, libraries being loaded, data

REPOSITORY = Path(__file__).resolve().parents[2]


def prepare() -> None:
    """Make this process fit for a command.

    Raises:
        SystemExit: with exit code 2, after saying what is needed, if it cannot be made so.
    """
    problem = system_problem() or python_problem() or open_files_problem()
    if problem:
        print(problem, file=sys.stderr)
        raise SystemExit(2)
    let_output_pass()


def let_output_pass() -> None:
    """Make of standard output and errors what no terminal, log or reader ends a command by."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # A terminal or a log that knows no β must not end a training.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        if _may_break(stream):
            setattr(sys, name, _Output(stream))


class _Output:
    """A stream whose reader may have seen enough, as `head` does: what is written for him is not ended by that."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._write_into_nothing()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._write_into_nothing()

    def _write_into_nothing(self):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _may_break(stream):
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or none of the system's
        return False
    return not isinstance(stream, _Output) and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def system_problem() -> str:
    if sys.platform != "win32":
        return ""
    return (
        "epsdpo: commands and notebooks lock files, end groups of processes and flush folders in ways that Windows has "
        "not. Use WSL 2: `wsl --install`, and in its shell everything is as on Linux"
    )


def python_problem() -> str:
    if sys.version_info < OLDEST_PYTHON:
        lacks = "is Python {}.{}, and 3.11 or newer is needed".format(*sys.version_info[:2])
    else:
        missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
        if not missing:
            return ""
        lacks = "lacks " + ", ".join(missing)
    if (REPOSITORY / ".venv" / "bin" / "python").exists():
        remedy = "Use the kit's environment: `. {0}/.venv/bin/activate`, or `{0}/.venv/bin/python -m epsdpo ...`"
    elif not (REPOSITORY / "Makefile").exists():
        remedy = "pip install 'epsdpo[kit]' brings what notebooks and commands need beside the library"
    else:
        remedy = "In {0}, `make demo` or `make test` set up .venv with all of it; then `. .venv/bin/activate`"
    return f"epsdpo: {sys.executable} {lacks}. {remedy.format(REPOSITORY)}"


def open_files_problem() -> str:
    """Raise the limit of open files to what is needed, as any user may up to the hard limit."""
    try:
        import resource
    except ImportError:  # not on a Unix
        return ""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ""
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        return (
            f"epsdpo: this process may open {hard} files (`ulimit -n`), and {OPEN_FILES} are needed. Raise the limit "
            "where you log in or submit, e.g. by `ulimit -n 1024`"
        )
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))
    return ""
