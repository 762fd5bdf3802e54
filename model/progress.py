"""One live line on a terminal, plain lines everywhere else (a log file, a pipe, CI)."""

import sys
import time
from typing import TextIO

_TTY_PERIOD_S = 0.2
_PLAIN_PERIOD_S = 10.0


def format_seconds(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class ProgressLine:
    """Rewrites its line in place on a terminal; elsewhere prints one every `plain_period` s."""

    def __init__(self, stream: TextIO | None = None, plain_period: float = _PLAIN_PERIOD_S):
        self._stream = sys.stdout if stream is None else stream
        self._is_tty = self._stream.isatty()
        self._period = _TTY_PERIOD_S if self._is_tty else plain_period
        self._last = float("-inf")
        self._width = 0

    def update(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if not force and now - self._last < self._period:
            return
        self._last = now
        if self._is_tty:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.close()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the live line, leaving it on the screen."""
        if self._is_tty and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0
