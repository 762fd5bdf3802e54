"""Tests collected once, run by selection in forked children.

Starting pytest and collecting a stem's tests takes longer than running most of them, and a mutation
run does it for hundreds of mutants. So one pytest session collects and never runs anything itself:
its loop is the mutation run, and each selection of its items runs in a fork of it, where a crash, a
changed environment or a time limit touches nobody else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# Seconds of CPU time for a test, beside ten times what it takes: a busy machine must not look like a
# hang. A process that sleeps is given up after WALL times the real seconds.
FLOOR, FACTOR, WALL = 10.0, 10.0, 20


class Test(NamedTuple):
    item: pytest.Item
    seconds: float
    kernels: frozenset[str]

    @property
    def limit(self) -> float:
        return FLOOR + FACTOR * self.seconds


class Outcome(NamedTuple):
    failure: str  # "" when all passed
    tests: list[tuple[int, float, list[str]]]  # index of the item, seconds, kernels it launched


class Recorder:
    """pytest plugin: how long each passing test took and what it launched; the first failure."""

    def __init__(self, used_kernels: Callable[[], list[str]]) -> None:
        self.used_kernels = used_kernels
        self.passed: list[tuple[float, list[str]]] = []
        self.failure = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failure = f"{report.nodeid}: {crash.message if crash else report.longrepr}"[:400]
        if report.when == "call" and report.passed:
            self.passed.append((report.duration, sorted(self.used_kernels())))


class _Loop:
    """pytest plugin: `work` in the place of running what was collected."""

    def __init__(self, work: Callable[[list[pytest.Item]], int]) -> None:
        self.work = work
        self.status = 2

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("collection failed")
        self.status = self.work(session.items)
        return True


def collect(options: list[str], work: Callable[[list[pytest.Item]], int]) -> int:
    """Collect by pytest's command line `options`, then work(items); work's status, or 2 when
    nothing could be collected."""
    loop = _Loop(work)
    pytest.main(["-q", "-s", "--no-header", "-p", "no:cacheprovider", *options], plugins=[loop])
    return loop.status


def run(
    items: list[pytest.Item],
    limits: list[float],
    prepare: Callable[[], None],
    used_kernels: Callable[[], list[str]],
) -> Outcome:
    """Run `items` in a fork, prepare() first, up to the first that fails or takes more than its
    limit in seconds of CPU time."""
    handle, name = tempfile.mkstemp()
    os.close(handle)
    report = Path(name)
    child = os.fork()
    if child == 0:
        _run_and_exit(items, limits, prepare, used_kernels, report)
    status = _end_of(child, WALL * sum(limits))
    text = report.read_text()
    report.unlink()
    if text:
        return Outcome(*json.loads(text))
    late = status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF)
    return Outcome("no end" if late else "the process died", [])


def _end_of(child: int, seconds: float) -> int | None:
    """The child's wait status; None when it had to be killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _run_and_exit(
    items: list[pytest.Item],
    limits: list[float],
    prepare: Callable[[], None],
    used_kernels: Callable[[], list[str]],
    report: Path,
) -> None:
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        prepare()
        recorder = Recorder(used_kernels)
        tests = []
        hooks = items[0].config
        hooks.pluginmanager.register(recorder)
        for index, (item, after) in enumerate(zip(items, [*items[1:], None], strict=True)):
            signal.setitimer(signal.ITIMER_PROF, limits[index])
            hooks.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if recorder.failure:
                break
            tests += [(index, *passed) for passed in recorder.passed]
            recorder.passed.clear()
        report.write_text(json.dumps([recorder.failure, tests]))
    finally:
        os._exit(0)
