"""The interactive page in a real headless browser, driven over the WebDriver protocol."""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request

import pytest

from dskernels.pipeline import Costs, make, simulate
from dskernels.pipeline.page import html

CHROME = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROME and DRIVER),
    reason="no chromium and chromedriver on PATH (Debian: apt-get install chromium-driver)",
)


class Browser:
    """A WebDriver session with nothing but urllib."""

    def __init__(self, port: int):
        self.base = f"http://127.0.0.1:{port}"
        options = {
            "binary": CHROME,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1000",
                     f"--user-data-dir={tempfile.mkdtemp()}"],
        }  # fmt: skip
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def run(self, script: str, *args):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def text(self, element_id: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", element_id)

    def slide(self, element_id: str, value) -> None:
        """What a moved slider does: a new value and an input event."""
        self.run(
            "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            element_id,
            str(value),
        )

    def press(self, element_id: str, key: str) -> None:
        """A real key on the focused element."""
        self.run("document.getElementById(arguments[0]).focus()", element_id)
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "k", "actions": keys}]})

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("GET", "/screenshot"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=1)
                break
            except OSError:
                time.sleep(0.1)
        session = Browser(port)
        path = tmp_path_factory.mktemp("page") / "pipeline.html"
        path.write_text(html())
        session.call("POST", "/url", {"url": path.as_uri()})
        yield session
        session.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=10)


def test_page_fetches_nothing():
    page = html()
    assert "http://" not in page and "https://" not in page
    assert "<script src" not in page and "<link" not in page and "@import" not in page
    assert "/*app.js*/" not in page


@needs_browser
def test_first_view_shows_the_known_figures(browser):
    assert browser.text("a-makespan-value") == "81"
    assert browser.text("a-bubble-value").startswith("21 =")
    assert browser.text("b-makespan-value") == "66"
    assert browser.text("b-bubble-value").startswith("6 =")
    assert browser.text("b-peak-value") == " ".join(["9"] * 8)
    painted = """
        return ['a', 'b'].map((id) => {
          const c = document.querySelector(`#${id} canvas.chart`);
          const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
          const seen = new Set();
          for (let i = 0; i < d.length; i += 4) seen.add(`${d[i]},${d[i + 1]},${d[i + 2]}`);
          return ['91,143,249', '47,158,110', '223,227,234'].map((rgb) => seen.has(rgb));
        })"""
    assert browser.run(painted) == [[True] * 3] * 2  # forward, backward and bubble are drawn
    target = os.environ.get("DSK_PAGE_SCREENSHOT")
    if target:
        with open(target, "wb") as file:
            file.write(browser.screenshot())


@needs_browser
def test_controls_change_the_figures_at_once(browser):
    browser.slide("b-schedule", "dualpipev")
    browser.slide("b-ranks", 4)
    assert browser.text("b-makespan-value") == "126"
    browser.slide("b-fb", 2.4)
    assert browser.text("b-ranks-value") == "3 3.6 4.2 4.2"
    before = float(browser.text("b-makespan-value"))
    browser.press("b-f", "\ue014")  # the right arrow key, on the slider of F
    assert browser.run("return panels.b.state.f") == 1.1
    assert float(browser.text("b-makespan-value")) > before
    assert browser.text("a-makespan-value") == "81"  # the other panel stays


@needs_browser
def test_formula_that_does_not_hold_is_marked(browser):
    for name, value in (("schedule", "dualpipe"), ("ranks", 8), ("f", 1), ("bi", 1.5), ("w", 0.9),
                        ("fb", 3)):  # fmt: skip
        browser.slide(f"b-{name}", value)
    assert browser.text("b-bubble-value").startswith("7.1 =")
    assert browser.text("b-formula-value") == "8.1"
    marked = "return document.getElementById('b-formula-value').classList.contains('off')"
    assert browser.run(marked)
    browser.slide("b-w", 1)
    browser.slide("b-bi", 1)
    assert not browser.run(marked)


@needs_browser
def test_illegal_sizes_are_explained(browser):
    browser.slide("b-schedule", "dualpipe")
    browser.slide("b-ranks", 7)
    assert "even number of ranks: showing 8" in browser.run(
        "return document.querySelector('#b .note').textContent"
    )
    browser.slide("b-ranks", 8)


@needs_browser
def test_page_and_simulator_agree_over_a_grid(browser):
    cases = []
    for name in ("gpipe", "1f1b", "interleaved", "zb1p", "zbv", "chimera", "dualpipe", "dualpipev"):
        for ranks, microbatches in ((2, 4), (4, 8), (4, 16), (6, 24), (8, 16)):
            for costs in ((1, 1, 1, 3, 0), (1, 1.5, 0.9, 3, 0), (0.7, 1.1, 0.6, 2.2, 0.3)):
                cases.append((name, ranks, microbatches, *costs))
    script = """
        return arguments[0].map(([name, p, m, f, bi, w, fb, latency]) => {
          const r = Pipeline.simulate(Pipeline.make(name, p, m), {f, bi, w, fb, latency});
          return [r.makespan, r.bubble, r.peak, r.formula, r.spanBubble];
        })"""
    legal = [c for c in cases if not (c[0] == "dualpipev" and c[2] < 2 * c[1])
             and not (c[0] == "dualpipe" and c[2] < 2 * c[1])]  # fmt: skip
    shown = browser.run(script, legal)
    assert len(legal) > 100
    for case, (makespan, bubble, peak, formula, span) in zip(legal, shown, strict=True):
        name, ranks, microbatches, f, bi, w, fb, latency = case
        result = simulate(
            make(name, ranks, microbatches), Costs(f=f, bi=bi, w=w, fb=fb, p2p_latency=latency)
        )
        assert makespan == pytest.approx(result.makespan), case
        assert bubble == pytest.approx(result.bubble), case
        assert span == pytest.approx(result.span_bubble, abs=1e-9), case
        assert peak == result.peak_activations, case
        assert formula == pytest.approx(result.bubble_formula) or formula is None, case
        assert (formula is None) == (result.bubble_formula is None), case


@needs_browser
def test_no_errors_were_logged(browser):
    logs = browser.call("POST", "/se/log", {"type": "browser"})
    assert [entry for entry in logs if entry["level"] == "SEVERE"] == []
