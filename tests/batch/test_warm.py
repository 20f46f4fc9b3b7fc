"""The process kept warm: what its forks are given, how they end, and when stages are started anew instead.

Processes are real. Most tests have a module of a few lines done in place of a stage.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from kit.waiting import wait_until

from epsdpo.batch import warm_client
from epsdpo.batch.warm import WarmProcess
from epsdpo.runs.watch import ORPHANED

ROOT = Path(__file__).parents[2]
PROBE = """
import json, os, resource, signal, sys, time
from pathlib import Path
from epsdpo.runs.watch import end_with_stdin
end_with_stdin()
exec(sys.argv[1])
"""


class Bench:
    """A warm process for the modules in a folder, and what asks it."""

    def __init__(self, folder: Path, imports: str = ""):
        self.folder, self.notices = folder, folder / "anew.txt"
        (folder / "probe.py").write_text(PROBE, encoding="utf-8")
        notebook = folder / "imports.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(imports)]), notebook)
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        self.environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.log = (folder / "warm.log").open("ab")
        self.stdin, self.held = os.pipe()
        os.chdir(folder)
        self.warm = WarmProcess([notebook], [], self.environment, self.log)

    def ask(self, code: str, **options) -> subprocess.Popen:
        command = [sys.executable, "-I", "-S", warm_client.__file__, self.warm.address, str(self.notices)]
        command += [sys.executable, "-m", "probe", code]
        streams = {"stdin": self.stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, **{"env": self.environment, **streams, **options})

    def answer(self, code: str, **options) -> tuple[int, str, str]:
        process = self.ask(code, **options)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def end(self) -> None:
        self.warm.end()
        self.log.close()
        os.close(self.stdin)
        os.close(self.held)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    before = Path.cwd()
    bench = Bench(tmp_path_factory.mktemp("bench"))
    yield bench
    bench.end()
    os.chdir(before)


@pytest.fixture
def own(tmp_path):
    """Makes a warm process for a test alone."""
    before, made = Path.cwd(), []

    def make(imports: str = "") -> Bench:
        made.append(Bench(tmp_path, imports))
        return made[0]

    yield make
    made[0].end()
    os.chdir(before)


def test_a_fork_is_given_what_a_process_begun_anew_is(shared):
    """Arguments, environment, folder, limits, streams and a command line of its own; and no open file of others, but a
    way to its kernel."""
    code = (
        "print(json.dumps([sys.argv[0], sys.orig_argv, dict(os.environ), os.getcwd(), sys.path, __name__, "
        "resource.getrlimit(resource.RLIMIT_NOFILE), signal.getsignal(signal.SIGCHLD), "
        "[[s.name, s.mode, s.encoding, s.errors, s.line_buffering] for s in (sys.stdin, sys.stdout, sys.__stderr__)], "
        "len(os.listdir('/proc/self/fd')), open('/proc/self/cmdline').read().rstrip(chr(0)).split(chr(0))]));"
        "sys.stdout.reconfigure(errors='replace'); print('said', file=sys.stderr)"
    )
    status, out, err = shared.answer(code)
    assert (status, err) == (0, "said\n") and not shared.notices.exists()
    anew = [sys.executable, "-m", "probe", code]
    begun = subprocess.run(anew, env=shared.environment, stdin=shared.stdin, capture_output=True, text=True)
    *given, files, shown = json.loads(out)
    *given_anew, files_anew, _ = json.loads(begun.stdout)
    assert given == given_anew and files == files_anew + 1
    assert shown[:3] == anew[:3]  # of the rest as much as there is room for


def test_a_fork_draws_numbers_of_its_own(shared):
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = " ".join(shared.answer(code)[1] for _ in range(2)).split()
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(3)", 3),
        ("os._exit(4)", 4),
        ("1 / 0", 1),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 128 + signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL),
    ],
)
def test_the_end_of_a_fork_is_passed_on(shared, code, status):
    assert shared.answer(code)[0] == status


WAITS = "Path('pid').write_text(str(os.getpid())); os.rename('pid', 'begun'); time.sleep(100)"


def begun(bench: Bench, client: subprocess.Popen) -> psutil.Process:
    """The fork of a client that waits, once it does."""
    wait_until((bench.folder / "begun").exists)
    fork = psutil.Process(int((bench.folder / "begun").read_text()))
    (bench.folder / "begun").unlink()
    assert fork.pid != client.pid
    return fork


def test_a_signal_is_passed_on(shared):
    client = shared.ask("signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); " + WAITS)
    begun(shared, client)
    client.terminate()
    assert client.wait(timeout=30) == 7


def keeper(fork: psutil.Process, client: subprocess.Popen) -> None:
    fork.parent().kill()


def asking(fork: psutil.Process, client: subprocess.Popen) -> None:
    client.kill()


def runner(fork: psutil.Process, client: subprocess.Popen) -> None:
    client.stdin.close()


@pytest.mark.parametrize(
    ("end", "status"), [(keeper, 128 + signal.SIGKILL), (asking, -signal.SIGKILL), (runner, ORPHANED)]
)
def test_a_fork_ends_with_who_keeps_it_or_asked_for_it(shared, end, status):
    client = shared.ask(WAITS, stdin=subprocess.PIPE)
    fork = begun(shared, client)
    end(fork, client)
    assert client.wait(timeout=30) == status
    wait_until(lambda: not fork.is_running() or fork.status() == psutil.STATUS_ZOMBIE)


def test_who_waits_for_the_warm_process_ends_with_its_runner(own):
    client = own().ask(WAITS, stdin=subprocess.PIPE)
    client.stdin.close()
    assert client.wait(timeout=30) == ORPHANED == warm_client.ORPHANED


def test_forks_outlive_the_warm_process_and_others_are_started_anew(own):
    bench = own()
    client = bench.ask(WAITS)
    fork = begun(bench, client)
    fork.parent().parent().kill()
    status, out, err = bench.answer("print('done')")
    assert (status, out) == (0, "done\n")
    assert err == "started anew: the process kept warm for this batch is gone\n"
    assert bench.notices.read_text() == "the process kept warm for this batch is gone\n"
    assert fork.is_running()
    fork.terminate()
    assert client.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cwd": "/"}, "its working directory is /, and "),
        ({"umask": 0o77}, "its umask is 63, and "),
        ({"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))}, "its limits is "),
        ({"preexec_fn": lambda: os.nice(1)}, "its priority is "),
        ({"PYTHONWARNINGS": "error"}, "its environment variable PYTHONWARNINGS is not as in the process kept warm"),
        ({"OMP_NUM_THREADS": "2"}, "its environment variable OMP_NUM_THREADS is not as in the process kept warm"),
    ],
)
def test_in_other_circumstances_a_stage_is_started_anew(shared, options, words):
    names = {name: value for name, value in options.items() if name.isupper()}
    others = {name: value for name, value in options.items() if name not in names}
    status, out, err = shared.answer("print('done')", **others, env={**shared.environment, **names})
    assert (status, out) == (0, "done\n")
    assert err.startswith(f"started anew: {words}")
    assert shared.notices.read_text().splitlines()[-1] == err.strip().removeprefix("started anew: ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()", "1 threads"),
        ("file = open(__file__)", "have opened /"),
        ("print('hello')", "an import said 'hello'"),
        ("1 / 0", "ZeroDivisionError as it imported: division by zero"),
        ("from epsdpo.batch import nothing", "ImportError as it imported"),
    ],
)
def test_imports_that_cannot_be_handed_on_are_named(own, tmp_path, module, words):
    (tmp_path / "odd.py").write_text(module, encoding="utf-8")
    status, out, err = own("import odd").answer("print('done')")
    assert (status, out) == (0, "done\n")
    assert err.startswith("started anew: ") and words in err


def test_code_that_has_changed_is_read_again(own, tmp_path):
    module = tmp_path / "changing.py"
    module.write_text("VALUE = 1", encoding="utf-8")
    bench = own("import changing")
    code = "import changing; print(changing.VALUE)"
    assert bench.answer(code) == (0, "1\n", "")
    module.write_text("VALUE = 22", encoding="utf-8")
    assert bench.answer(code) == (0, "22\n", f"started anew: {module} has changed\n")


def test_imports_take_the_process_for_a_kernel(own, tmp_path):
    """Libraries that ask as they are imported whether they are in a notebook; and streams that they keep."""
    (tmp_path / "asks.py").write_text(
        "import sys, transformers.utils\nfrom tqdm.autonotebook import tqdm\n"
        "KERNEL = transformers.utils.is_in_notebook(), hasattr(get_ipython(), 'kernel')\nSTREAM = sys.stderr",
        encoding="utf-8",
    )
    code = (
        "import asks, builtins; print(*asks.KERNEL, hasattr(builtins, 'get_ipython'), file=asks.STREAM);"
        "from IPython import get_ipython; print(get_ipython())"
    )
    assert own("import asks").answer(code) == (0, "None\n", "True True False\n")
