"""JupyterLab as `make lab` starts it, and a notebook run in it as a user would: opened, Run All Cells, saved."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from kit.chromium import Tab

START_SECONDS = 60
RUN_SECONDS = 120  # for one notebook
WIDEST_ICON = 200  # pixels; a figure is wider

# What a user sees of the notebook in front, for the waiting below.
_OPEN_NOTEBOOK = """
window.openNotebook = {
  get panel() { return jupyterapp.shell.currentWidget; },
  get isIdle() { return this.panel.sessionContext.session?.kernel?.status === 'idle'; },
  get cells() { return this.panel.content.widgets; },
  get codeCells() { return this.cells.filter(cell => cell.model.type === 'code'); },
  get isRun() { return this.codeCells.every(cell => cell.model.executionCount); },
  get errors() {
    return this.codeCells.flatMap(cell => cell.model.outputs.toJSON())
      .filter(output => output.output_type === 'error').map(output => `${output.ename}: ${output.evalue}`);
  },
  get cellsWithFigure() {
    const hasFigure = cell => cell.model.outputs.toJSON().some(output => output.data?.['image/png']);
    return this.codeCells.filter(hasFigure).map(cell => this.cells.indexOf(cell));
  },
  // 0 unless the image is loaded and within the window.
  widthSeen(index) {
    const image = this.cells[index].node.querySelector('.jp-OutputArea img');
    const box = image?.getBoundingClientRect();
    return image?.complete && box.width && box.top < innerHeight && box.bottom > 0 ? image.naturalWidth : 0;
  },
};
null"""


@contextlib.contextmanager
def make_lab(checkout: Path, home: Path, environment: dict[str, str]) -> Iterator[str]:
    """Run `make lab` in `checkout` with settings of its own in `home`; yields the address to open, then ends it.

    The virtual environment is the one that runs the tests, and no setting of the user's can interfere.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex()  # other users of this machine may reach the port as well
    settings = {
        "ServerApp": {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "allow_root": True},
        "IdentityProvider": {"token": token},
        "LabApp": {"expose_app_in_browser": True},
    }
    folders = {name: home / name for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}
    folders |= {name: home / name for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    config = folders["JUPYTER_CONFIG_DIR"] / "jupyter_server_config.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    (checkout / ".venv").symlink_to(sys.prefix)
    # Within `make test-browser` the outer make would pass on its own options.
    environment = {
        name: value for name, value in environment.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    environment |= {name: str(folder) for name, folder in folders.items()}

    log_file = home / "lab.log"
    with log_file.open("w") as log:
        server = subprocess.Popen(
            ["make", "--old-file=.venv/ready", "lab"],
            cwd=checkout,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_for_answer(f"http://127.0.0.1:{port}/api", server, log_file)
        yield f"http://127.0.0.1:{port}/lab?token={token}"
    finally:
        _end_group(server)


def _wait_for_answer(url: str, server: subprocess.Popen, log_file: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url, timeout=5):
            return
        alive = server.poll() is None
        assert alive and time.monotonic() < deadline, f"JupyterLab did not start:\n{log_file.read_text()}"
        time.sleep(0.2)


def _end_group(server: subprocess.Popen) -> None:
    """End make and the server below it; the server ends its kernels."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def run_all_cells(tab: Tab, path: str) -> list[int]:
    """Open the notebook `path` of JupyterLab's root in its tab, run all cells, look at each figure, save, shut down.

    Returns:
        The widths in pixels of the figures, as loaded by the browser and in its view, in the order of the cells.

    Raises:
        AssertionError: if a cell ends in an error, or a figure does not appear.
    """
    tab.wait_for("window.jupyterapp", START_SECONDS)
    tab.evaluate("jupyterapp.restored.then(() => null)")
    tab.evaluate(_OPEN_NOTEBOOK)
    tab.evaluate(f"jupyterapp.commands.execute('docmanager:open', {{path: {path!r}}}).then(() => null)")
    tab.wait_for(f"openNotebook.panel?.context?.path === {path!r} && openNotebook.isIdle", START_SECONDS)

    tab.evaluate("void jupyterapp.commands.execute('runmenu:run-all')")
    tab.wait_for("openNotebook.isRun && openNotebook.isIdle || openNotebook.errors.length", RUN_SECONDS)
    errors = tab.evaluate("openNotebook.errors")
    assert not errors, f"{path}: {errors}"

    widths = [_width_of_figure(tab, cell) for cell in tab.evaluate("openNotebook.cellsWithFigure")]
    tab.evaluate("jupyterapp.commands.execute('docmanager:save').then(() => null)")
    tab.evaluate("openNotebook.panel.sessionContext.shutdown().then(() => null)")
    return widths


def scroll_to(tab: Tab, cell: int) -> None:
    """Bring the cell of that index into view, for JupyterLab draws no others."""
    tab.evaluate(f"openNotebook.panel.content.scrollToItem({cell}, 'start').then(() => null, () => null)")


def _width_of_figure(tab: Tab, cell: int) -> int:
    """Scroll to the cell until its figure is in view.

    One call need not be enough: JupyterLab estimates the heights of cells that it has not drawn, and the cell moves
    away again when those above it turn out to be higher or lower.
    """
    deadline = time.monotonic() + START_SECONDS
    while (width := tab.evaluate(f"openNotebook.widthSeen({cell})")) <= WIDEST_ICON:
        assert time.monotonic() < deadline, f"after {START_SECONDS} s the figure of cell {cell} is still not in view"
        scroll_to(tab, cell)
        time.sleep(0.2)
    return width
