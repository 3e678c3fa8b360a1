"""A headless Chromium that is driven through the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One tab; https://chromedevtools.github.io/devtools-protocol names the commands."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, os.fdopen(answers, "rb", buffering=0)
        self._number, self._session, self._read = 0, "", b""

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._read:
            read = self._answers.read(2**16)
            assert read, "the browser has ended"
            self._read += read
        answer, _, self._read = self._read.partition(b"\0")
        return json.loads(answer)

    def attach(self) -> Self:
        """Open a tab; all further commands go to it."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = session
        self("Page.enable")
        return self

    def open(self, file: Path, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Open a file at a width in CSS pixels, and wait until it has been loaded."""
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Page.navigate", url=file.absolute().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def hover(self, x: float, y: float) -> None:
        """Move the pointer."""
        self("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path, *, full: bool = True) -> bytes:
        """Write a PNG of the page, or of what is visible, and return its bytes."""
        data = self("Page.captureScreenshot", captureBeyondViewport=full)["data"]
        file.write_bytes(base64.b64decode(data))
        return file.read_bytes()


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """Start Chromium and yield a tab of it."""
    assert CHROMIUM is not None
    command_reader, command_writer = os.pipe()
    answer_reader, answer_writer = os.pipe()

    def connect() -> None:  # in the new process: the browser reads from 3 and writes to 4
        reader, writer = os.dup(command_reader), os.dup(answer_writer)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    # Processes of the browser may outlive it for a moment, and write into the profile.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
            ],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(command_reader)
        os.close(answer_writer)
        try:
            yield Page(command_writer, answer_reader).attach()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(command_writer)
