"""Facts about the pages in a browser: headless Chromium, over its debugging pipe. Skipped where it is not installed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from fullrank.funnel import Funnel
from fullrank.serving import create_app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian package chromium)")

# The browser listens on file 3 and speaks on file 4.
LAUNCH = """
import fcntl, os, sys
files = [fcntl.fcntl(int(name), fcntl.F_DUPFD, 10) for name in sys.argv[1:3]]
os.dup2(files[0], 3)
os.dup2(files[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

# Contrast of each text with what is behind it (WCAG 2.2, 1.4.3), the lowest first.
CONTRAST = """
(() => {
  const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  // A colour may be written as a mix; a pixel of it has numbers.
  const numbers = color => {
    brush.clearRect(0, 0, 1, 1); brush.fillStyle = color; brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = numbers(getComputedStyle(element).backgroundColor);
      if (color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility())
    .filter(e => !["SCRIPT", "STYLE"].includes(e.tagName))
    .map(e => {
      const style = getComputedStyle(e), svg = e.closest("svg");
      const [a, b] = [light(numbers(svg ? style.fill : style.color)), light(behind(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName, e.textContent.slice(0, 40)];
    }).sort((x, y) => x[0] - y[0]).slice(0, 3);
})()
"""


class Browser:
    """One tab. Every wait has an end."""

    def __init__(self, profile: Path) -> None:
        (read_here, their_out), (their_in, write_here) = os.pipe(), os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [CHROMIUM or "", *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(their_in), str(their_out), *command],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)
        self._in, self._out = read_here, write_here
        self._rest, self._count, self._session = b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        said: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            said["sessionId"] = self._session
        os.write(self._out, json.dumps(said).encode() + b"\0")
        deadline = time.monotonic() + 30
        while (left := deadline - time.monotonic()) > 0:
            if b"\0" not in self._rest:
                if select.select([self._in], [], [], left)[0]:
                    read = os.read(self._in, 1 << 20)
                    assert read, "the browser ended"
                    self._rest += read
                continue
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
        raise TimeoutError(method)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + 20
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def open(self, url: str, *, width: int, dark: bool = False, script: bool = True) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **typed)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        with suppress(OSError, AssertionError, TimeoutError):
            self._session = None
            self.call("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def place(funnel: Funnel, listening: Callable[[FastAPI], AbstractContextManager[str]]) -> Iterator[str]:
    with listening(create_app(funnel)) as url:
        yield url


PAGES = ["/", "/?user=3&k=5", "/?user=nobody&features=%7B", "/docs"]


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_fits_a_phone_and_can_be_read(browser: Browser, place: str, path: str, dark: bool) -> None:
    browser.open(place + path, width=390, dark=dark)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.evaluate("innerWidth") == 390 and browser.evaluate(wide) <= 0
    for contrast, *where in browser.evaluate(CONTRAST):
        assert contrast >= 4.5, where
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, back[4:-1].split(","))) < 60) == dark


def test_a_list_is_had_by_keyboard_alone(browser: Browser, place: str) -> None:
    browser.open(place + "/", width=1000)
    seen = []
    for _ in range(6):
        browser.press("Tab", 9)
        seen.append(browser.evaluate("document.activeElement.name || document.activeElement.textContent"))
    assert seen == ["API", "metrics", "user", "k", "Recommend", "Describe the user"]
    browser.evaluate("document.querySelector('input[name=user]').focus()")
    browser.call("Input.insertText", text="3")
    browser.press("Enter", 13, "\r")
    browser.until("document.querySelectorAll('#answer td.place').length > 0")
    # It came without a new page, is where the address says, and has the focus.
    assert browser.evaluate("location.search") == "?user=3&k=10"
    assert browser.evaluate("document.activeElement.id") == "list"
    outline = "getComputedStyle(document.querySelector('a')).outlineStyle"
    browser.press("Tab", 9)
    browser.evaluate("document.querySelector('a').focus()")
    assert browser.evaluate(outline) != "none"


def test_the_list_is_there_without_a_script(browser: Browser, place: str) -> None:
    browser.open(place + "/?user=3&k=4", width=1000, script=False)
    assert browser.evaluate("document.querySelectorAll('#answer tr.kept').length") == 4


def test_the_script_of_the_page_is_allowed_and_keeps_numbers_fresh(browser: Browser, place: str) -> None:
    browser.open(place + "/", width=1000)
    before = browser.evaluate("document.querySelector('#live b').textContent")
    browser.until(f"document.querySelector('#live b').textContent !== {json.dumps(before)}")


def test_a_screenshot_shows_something(browser: Browser, place: str) -> None:
    image = pytest.importorskip("PIL.Image")
    from io import BytesIO

    browser.open(place + "/?user=3&k=5", width=1000)
    shot = image.open(BytesIO(browser.screenshot())).convert("RGB")
    assert shot.width > 900
    assert len(shot.getcolors(shot.width * shot.height)) > 200
