"""A headless Chromium and its tabs, spoken to by the Chrome DevTools protocol over a local websocket.

It knows how to open an address, evaluate JavaScript there and keep a picture of a failure. What a page should show is
left to the tests.
"""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

START_SECONDS = 30
ANSWER_SECONDS = 60

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = [
    "--headless=new",
    "--remote-debugging-port=0",
    "--window-size=1400,1000",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    # A container gives neither the namespaces of the sandbox, nor more than 64 MB of shared memory, nor a GPU.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
]


class Tab:
    """One open page. Its methods wait for the browser's answer."""

    def __init__(self, socket_url: str):
        # Chromium refuses a websocket that names an origin, lest a page should steer the browser.
        self._socket = websocket.create_connection(socket_url, timeout=ANSWER_SECONDS, suppress_origin=True)
        self._numbers = itertools.count(1)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol; events that arrive meanwhile are passed over."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise; it has to be something that JSON can say.

        Raises:
            AssertionError: with the page's own message, if the expression throws.
        """
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if problem := answer.get("exceptionDetails"):
            text = problem.get("exception", {}).get("description") or problem["text"]
            raise AssertionError(f"{expression!r} failed in the page: {text}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float) -> None:
        """Return as soon as a JavaScript expression is true.

        Raises:
            AssertionError: if it is still not after `seconds`.
        """
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"after {seconds} s still not true in the page: {condition}"
            time.sleep(0.2)

    def save_screenshot(self, path: Path) -> None:
        """Write what the tab shows as a PNG."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()


class Chromium:
    """The browser's process, with a profile of its own."""

    def __init__(self, profile: Path):
        names = [name for name in _NAMES if shutil.which(name)]
        assert names, f"none of {', '.join(_NAMES)} is on the PATH; on Debian: apt-get install chromium"
        self._profile = profile
        self._log = profile.with_suffix(".log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [names[0], *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
            )
        try:
            self._address = f"http://127.0.0.1:{self._wait_for_port()}"
        except BaseException:
            self.quit()
            raise

    def _wait_for_port(self) -> int:
        """The port that Chromium chose; it says so in a file of its profile when it listens."""
        file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + START_SECONDS
        while not (file.exists() and file.read_text().count("\n")):
            alive = self._process.poll() is None
            assert alive and time.monotonic() < deadline, f"Chromium did not start:\n{self._log.read_text()}"
            time.sleep(0.1)
        return int(file.read_text().splitlines()[0])

    @contextlib.contextmanager
    def tab(self, url: str, screenshots: Path) -> Iterator[Tab]:
        """A tab in which `url` has been loaded whole; an exception leaves a picture in the folder `screenshots`."""
        target = self._ask("PUT", "/json/new?about:blank")
        tab = Tab(target["webSocketDebuggerUrl"])
        try:
            # As if a user were looking: in a tab without the focus JupyterLab has no current notebook.
            tab.command("Page.bringToFront")
            tab.command("Emulation.setFocusEmulationEnabled", enabled=True)
            tab.command("Page.navigate", url=url)
            # The blank page before it is complete as well.
            tab.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'", START_SECONDS)
            yield tab
        except Exception as error:
            picture = screenshots / f"failure-{target['id'][:8]}.png"
            with contextlib.suppress(Exception):  # the tab may be what failed
                tab.save_screenshot(picture)
                error.add_note(f"what the browser showed: {picture}")
            raise
        finally:
            tab.close()
            self._ask("GET", f"/json/close/{target['id']}")

    def _ask(self, method: str, path: str) -> Any:
        request = urllib.request.Request(self._address + path, method=method)
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def quit(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
