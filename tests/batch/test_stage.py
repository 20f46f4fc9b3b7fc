"""Running a notebook as a stage: strict parameters, manifest last, readable failures, no orphaned kernels.

The notebooks are tiny but real, and so are the kernels. The order of a batch is checked with a recorder in place of the
kernels, since starting eleven of them would only make the same calls more slowly.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from jupyter_client.connect import LocalPortCache
from kit.waiting import running, wait_until

from epsdpo.batch import jupyter
from epsdpo.batch import stage as stages
from epsdpo.batch.specs import STAGES
from epsdpo.batch.stage import StageError, check_parameters, read_parameters, run_stage
from epsdpo.experiment import ConfigError
from epsdpo.experiment.paths import REPOSITORY, resolve_path
from epsdpo.runs.preempted import PREEMPTED

COMMITTED = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

PARAMETERS = "output_dir: str\nsteps: int = 1\nlr: float = 0.5\nlive: bool = True\ndata_dir: str = ''"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A function that writes cells as the notebook of stage `train` and returns its path."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.setattr(stages, "NOTEBOOKS", folder)

    def write(*cells: str, parameters: str = PARAMETERS) -> Path:
        book = nbformat.v4.new_notebook()
        # A kernel that nobody has: the stage has to use this interpreter all the same.
        book.metadata.kernelspec = {"name": "no-such-kernel", "display_name": "none", "language": "python"}
        book.cells = [
            nbformat.v4.new_markdown_cell("# Heading"),
            nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
            *map(nbformat.v4.new_code_cell, cells),
        ]
        nbformat.write(book, folder / "02_train.ipynb")
        return folder / "02_train.ipynb"

    return write


def test_a_finished_stage(notebook, tmp_path, monkeypatch, capfd):
    notebook(
        "import sys\nfrom pathlib import Path\nprint('run by', sys.executable, 'for', steps * lr)",
        "(Path(output_dir) / 'result.txt').write_text('42')",
        "import matplotlib.pyplot as plt\nplt.plot([0, 1]);",
        "(Path(output_dir) / 'manifest.json').exists()",
    )
    monkeypatch.setenv("MPLBACKEND", "Agg")
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    (upstream / "manifest.json").write_text('{"key": "k"}')
    (upstream / "weights.bin").write_text("not described: the manifest stands for the folder")
    output_dir = tmp_path / "run" / "train"
    output_dir.mkdir(parents=True)
    (output_dir / "manifest.json").write_text("of an earlier run")

    path = run_stage("train", {"steps": 3, "lr": 2, "data_dir": str(upstream)}, output_dir)

    streamed = f"run by {sys.executable} for 6.0"
    assert streamed in capfd.readouterr().out
    executed = nbformat.read(output_dir / "notebook.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert outputs[-1].data["text/plain"] == "False", "the old manifest was still there while the stage ran"
    assert any("image/png" in output.get("data", {}) for output in outputs), "MPLBACKEND swallowed the figure"

    page = (output_dir / "notebook.html").read_text(encoding="utf-8")
    assert streamed in page
    assert "import sys" not in page
    assert "<script" not in page
    assert "data:image/png;base64" in page

    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert path == output_dir / "manifest.json"
    assert manifest["stage"] == "train"
    assert manifest["status"] == "ok"
    assert manifest["parameters"] == {
        "output_dir": str(output_dir),
        "steps": 3,
        "lr": 2.0,
        "data_dir": str(upstream),
    }
    assert manifest["outputs"].keys() == {"notebook.html", "notebook.ipynb", "result.txt"}
    assert manifest["outputs"]["result.txt"] == {"bytes": 2, "sha256": hashlib.sha256(b"42").hexdigest()}
    assert manifest["inputs"] == {
        str(upstream / "manifest.json"): {"bytes": 12, "sha256": hashlib.sha256(b'{"key": "k"}').hexdigest()}
    }
    assert manifest["key_parts"]["inputs"] == {"data": "k"}
    assert manifest["started"] <= manifest["finished"]
    assert manifest["packages"]["trl"].startswith("1.")
    assert manifest["cpus"] == os.cpu_count()


def test_a_record_that_was_begun_anew_is_marked(notebook, tmp_path):
    notebook(
        "from epsdpo.methods.record_writer import StepRecord\nrecord = StepRecord(output_dir)",
        "record.rewind(12)\nrecord.announce(36)",
    )
    manifest = json.loads(run_stage("train", {}, tmp_path).read_text(encoding="utf-8"))
    assert manifest["record"]["first_step"] == 13 and "begins at step 13" in manifest["record"]["problem"]


def test_a_failing_cell(notebook, tmp_path):
    notebook("loss = 1.0", "raise ValueError('loss is NaN at step 7')", "open(output_dir + '/late', 'w')")
    (tmp_path / "manifest.json").write_text("of an earlier run")

    with pytest.raises(StageError, match="loss is NaN at step 7") as failure:
        run_stage("train", {}, tmp_path)

    message = str(failure.value)
    assert message.startswith("stage train failed: ValueError")
    assert str(tmp_path / "notebook.ipynb") in message
    assert "\x1b" not in message, "terminal colours in an error message"
    assert "loss is NaN" in (tmp_path / "notebook.html").read_text(encoding="utf-8")
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "late").exists()


def test_a_killed_kernel(notebook, tmp_path):
    notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StageError, match="out of memory"):
        run_stage("train", {}, tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "notebook.html").exists()


def test_a_port_that_another_process_took_first(notebook, tmp_path, monkeypatch, capfd):
    """Ports are chosen before the kernel binds them; it ends where one is taken by then, and is started once more."""
    notebook("(output_dir and open(output_dir + '/result', 'w').write('42'))")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        choose = LocalPortCache.find_available_port
        ports = iter([taken.getsockname()[1]])
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda *a: next(ports, None) or choose(*a))
        run_stage("train", {}, tmp_path / "out")
    assert (tmp_path / "out" / "result").read_text() == "42"
    assert "the kernel did not start" in capfd.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(LocalPortCache, "find_available_port", lambda *_: taken.getsockname()[1])
        with pytest.raises(StageError, match="its kernel did not start, 3 times"):
            run_stage("train", {}, tmp_path / "never")


def test_leaving_early_is_a_failure(notebook, tmp_path):
    notebook("import sys\nsys.exit(0)")
    with pytest.raises(StageError, match="left the notebook early"):
        run_stage("train", {}, tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def start_stage(book, output):
    program = (
        "import pathlib, sys\nfrom epsdpo.batch import stage as stages\nimport epsdpo.__main__ as command\n"
        f"stages.NOTEBOOKS = pathlib.Path({str(book.parent)!r})\n"
        f"sys.exit(command.main(['stage', 'train', '--output', {str(output)!r}]))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_the_kernel_and_its_children(notebook, tmp_path):
    """As a scheduler ends a job: the runner is told, and nothing of it may keep the GPU."""
    book = notebook(
        "import os, subprocess, time\nchild = subprocess.Popen(['sleep', '60'])",
        "open(output_dir + '/pids.part', 'w').write(f'{os.getpid()} {child.pid}')",
        "os.rename(output_dir + '/pids.part', output_dir + '/pids')\ntime.sleep(60)",
    )
    runner = start_stage(book, tmp_path)
    try:
        wait_until((tmp_path / "pids").exists)
        processes = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
        runner.send_signal(signal.SIGTERM)
        assert runner.wait(timeout=30) == 143
        wait_until(lambda: not running(processes))
    finally:
        runner.kill()
    assert not (tmp_path / "manifest.json").exists()


def test_a_stage_that_is_told_to_end_before_it_has_a_kernel_ends(monkeypatch):
    class Ended(Exception):
        pass

    def end(*_):
        raise Ended

    monkeypatch.setattr(jupyter, "_execute", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(Ended):
            jupyter.execute(Path("notebook.ipynb"), Path("executed.ipynb"), {})
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_that_is_told_to_end_by_way_of_its_stage_has_time_to_save(notebook, tmp_path):
    """Its kernel is told twice: by its stage and, as on a cluster that tells all processes of a job, by itself."""
    book = notebook(
        "import pathlib, time\nfrom epsdpo.runs.preempted import Preempted, told_to_end\ntold = []",
        "with told_to_end(lambda: told.append('told')):\n"
        "    pathlib.Path(output_dir, 'began').touch()\n"
        "    while not told:\n"
        "        time.sleep(0.01)\n"
        "time.sleep(3)\n"
        "pathlib.Path(output_dir, 'saved').touch()\n"
        "raise Preempted('saved at step 7')",
    )
    stage = start_stage(book, tmp_path)
    try:
        wait_until((tmp_path / "began").exists)
        (kernel,) = psutil.Process(stage.pid).children()
        for process in (kernel, stage):
            process.send_signal(signal.SIGTERM)
        _, err = stage.communicate(timeout=60)
    finally:
        stage.kill()
    assert stage.returncode == PREEMPTED and err.endswith("saved at step 7\n")
    assert (tmp_path / "saved").exists() and not (tmp_path / "manifest.json").exists()
    assert json.loads((tmp_path / "stage.json").read_text(encoding="utf-8"))["status"] == "running"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "parameter 'stepz' is unknown; did you mean 'steps'"),
        ({"steps": "3"}, r"'steps' is '3' of type str; expected int"),
        ({"lr": "7e-7"}, r"'lr' is '7e-7' of type str; expected float.*Write 7.0e-7"),
        ({"steps": True}, "'steps' is True of type bool; expected int"),
        ({"lr": False}, "'lr' is False of type bool; expected float"),
        ({"steps": 3.0}, "'steps' is 3.0 of type float; expected int"),
        ({"live": 1}, "'live' is 1 of type int; expected bool"),
        ({"data_dir": None}, "'data_dir' is None of type NoneType; expected str"),
        ({"data_dir": "nowhere"}, "nowhere: no such file or folder"),
    ],
)
def test_bad_parameters_are_refused_before_a_kernel_starts(notebook, tmp_path, values, message):
    notebook("open(output_dir + '/ran', 'w')")
    with pytest.raises(ConfigError, match=message):
        run_stage("train", values, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_bad_parameter_is_named_at_once(notebook):
    with pytest.raises(ConfigError) as refusal:
        check_parameters(notebook(), {"stepz": 1, "live": "yes"})
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert "'output_dir' is missing" in lines[0]


@pytest.mark.parametrize("cell", ["steps = 1", "steps: dict = {}", "steps: int = 1\nprint(steps)"])
def test_a_parameters_cell_holds_typed_assignments_only(notebook, cell):
    with pytest.raises(StageError, match="has no type"):
        read_parameters(notebook(parameters=cell))


def test_a_notebook_needs_one_parameters_cell(notebook):
    path = notebook()
    book = nbformat.read(path, as_version=4)
    book.cells = [book.cells[0]]
    nbformat.write(book, path)
    with pytest.raises(StageError, match="0 cells are tagged"):
        read_parameters(path)


def test_a_missing_notebook_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "NOTEBOOKS", tmp_path)
    with pytest.raises(StageError, match=r"02_train\.ipynb is not there"):
        run_stage("train", {}, tmp_path / "out")


def test_paths_from_the_working_directory_win_over_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("epsdpo/files.py") == REPOSITORY / "epsdpo" / "files.py"
    (tmp_path / "epsdpo").mkdir()
    (tmp_path / "epsdpo" / "files.py").touch()
    assert resolve_path("epsdpo/files.py").resolve() == (tmp_path / "epsdpo" / "files.py").resolve()
    with pytest.raises(ConfigError, match=r"no-such\.yaml: no such file"):
        resolve_path("no-such.yaml")


def test_the_committed_notebooks_are_those_of_the_stages():
    assert {path.name for path in COMMITTED} == {spec.notebook for spec in STAGES.values()}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_papermill_reads_every_parameter(path, caplog):
    assert papermill.inspect_notebook(path) and not caplog.records


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_are_clean(path):
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    assert book.metadata.kernelspec.name == "python3"
    assert "papermill" not in book.metadata
    for cell in book.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert "papermill" not in cell.metadata
    parameters = read_parameters(path)
    assert "output_dir" in parameters
    assert not any(parameter.required for parameter in parameters.values()), "a notebook opens with working defaults"


def test_the_key_to_a_kernel_stays_on_no_disk(notebook, tmp_path, monkeypatch):
    """Not while the notebook runs, so that no kill leaves it; what a kill at the kernel's start has left goes."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    notebook(f"import os\nopen(output_dir + '/seen', 'w').write(' '.join(os.listdir({str(temporary)!r})))")
    output_dir = tmp_path / "{out} #2"
    run_stage("train", {}, output_dir)
    assert (output_dir / "seen").read_text() == "" and not list(temporary.iterdir())

    killed = "\n".join(
        [
            "import os, signal, sys, pathlib",
            "from epsdpo.batch import jupyter, stage as stages",
            f"stages.NOTEBOOKS = pathlib.Path({str(stages.NOTEBOOKS)!r})",
            "jupyter._Client.wait_for_ready = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)",
            f"stages.run_stage('train', {{}}, {str(output_dir)!r})",
        ]
    )
    environment = {**os.environ, "TMPDIR": str(temporary)}
    assert subprocess.run([sys.executable, "-c", killed], env=environment).returncode == -signal.SIGKILL
    (key_file,) = temporary.glob("epsdpo-kernel-*.json")
    # The kernel that it was for writes the file anew if it is gone when that begins, and ends as its parent is gone.
    wait_until(
        lambda: not any(str(key_file) in (one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
    )
    run_stage("train", {}, output_dir)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["-x", "{x} {}", "a\nline 😀"])
def test_a_folder_may_have_any_name(notebook, tmp_path, monkeypatch, name):
    notebook("open(output_dir + '/result', 'w').write('42')")
    monkeypatch.chdir(tmp_path)
    assert run_stage("train", {}, name) == Path(name) / "manifest.json"
    assert (tmp_path / name / "result").read_text() == "42" and (tmp_path / name / "notebook.html").exists()
