"""Interleaved timing: candidates take turns, so that load on the machine meets them all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, the quartiles around it, the fastest, and processor time.

    `processor` is the median over calls of the processor time of all threads: on a machine that
    others use too it holds still where the clock does not. It counts threads that spin, too.
    """

    median: float
    low: float
    high: float
    best: float
    processor: float
    samples: int


def interleave(
    candidates: dict[str, Callable[[], object]],
    *,
    rounds: int = 15,
    seconds: float = 20.0,
    warm: bool = True,
) -> dict[str, Timing]:
    """Time every candidate once per round, in turn; at least 3 rounds, at most `seconds` in all.

    warm  call a candidate once, untimed, before its timed call: its weights are then in cache.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in candidates.items():
            if warm:
                call()
            begin, used = time.perf_counter(), time.process_time()
            call()
            samples[name].append((time.perf_counter() - begin, time.process_time() - used))
    return {name: _summary(times) for name, times in samples.items()}


def _summary(samples: list[tuple[float, float]]) -> Timing:
    times, used = zip(*samples)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, min(times), statistics.median(used), len(times))
