"""A real browser for tests of pages: headless Chromium, spoken to over two pipes.

Chromium's own protocol (DevTools), JSON messages that end in a zero byte; no port is opened and no
package is needed. The browser has no way out: its proxy is a closed port.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """Give the browser's program; CDR_BROWSER names one that is not in PATH."""
    given = os.environ.get("CDR_BROWSER")
    return given or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a running browser.

    Args:
        send: file descriptor to write messages to.
        receive: file descriptor to read messages from.

    Attributes:
        events: what the page has reported so far, as (method, parameters).
    """

    def __init__(self, send: int, receive: int) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._send, self._receive, self._buffer = send, receive, b""
        self._number, self._session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                found: dict[str, Any] = answer["result"]
                return found

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there, with all it asked for."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._read()
        # What was asked for late comes before this answer.
        self.evaluate("new Promise(done => setTimeout(() => done(1), 300))")

    def evaluate(self, expression: str) -> Any:
        """Give the value of a JavaScript expression in the page."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def look(self, *, width: int, dark: bool = False, height: int = 900) -> None:
        """Set the width of the window, in CSS pixels, and the reader's colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def requests(self) -> list[str]:
        """Give the addresses of everything the page asked for, itself included."""
        return [
            parameters["request"]["url"]
            for method, parameters in self.events
            if method == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Give what the console shows: errors, warnings, refused requests."""
        found = []
        for method, parameters in self.events:
            if method == "Log.entryAdded":
                found.append(parameters["entry"]["text"])
            elif method == "Runtime.exceptionThrown":
                found.append(parameters["exceptionDetails"]["text"])
            elif method == "Runtime.consoleAPICalled":
                found.append(str(parameters["args"]))
        return found

    def _read(self, timeout_s: float = 60) -> dict[str, Any]:
        end = time.monotonic() + timeout_s
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._receive], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self._receive, 1 << 20) if ready else b""
            assert chunk, "the browser has ended, or does not answer"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message


@contextlib.contextmanager
def run_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Run a browser with a new profile, and end it.

    Args:
        program: from `find_browser`.
        profile: folder for what it writes.
    """
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    command = [
        program,
        "--headless",
        "--remote-debugging-pipe",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--proxy-server=127.0.0.1:1",
        "about:blank",
    ]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # it refuses to run as root with one
    # The browser reads from 3 and writes to 4, whatever numbers the pipes have here.
    redirect = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
    with subprocess.Popen(
        ["/bin/bash", "-c", redirect, "browser", *command],
        pass_fds=(to_browser, from_browser),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    ) as process:
        os.close(to_browser)
        os.close(from_browser)
        try:
            browser = Browser(from_us, to_us)
            yield browser
            browser._session = ""
            browser.call("Browser.close")
        finally:
            os.close(from_us)
            os.close(to_us)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
