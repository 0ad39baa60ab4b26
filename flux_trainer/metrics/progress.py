"""How far a piece of work is and how long it will still take: a line that a terminal redraws."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from flux_trainer.metrics.console import duration

ON_TERMINAL, IN_FILE = 0.2, 10.0  # seconds between lines


class Progress:
    """Counts work in any unit; on a terminal it redraws its line, elsewhere it writes one now and then."""

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        """total: all the work; nothing is shown if it is 0."""
        self.total = total
        self.done = 0.0
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start = self.shown = time.monotonic()

    def advance(self, work: float, what: str) -> None:
        """`work` more is done; `what` says in words how far that is."""
        self.done += work
        now = time.monotonic()
        if self.total and now - self.shown >= (ON_TERMINAL if self.terminal else IN_FILE):
            self.shown = now
            self.write(self.line(what, now - self.start))

    def line(self, what: str, elapsed: float) -> str:
        """`3 of 8 pictures, 41 %, 0:12 gone, 0:17 left`."""
        left = elapsed * (self.total - self.done) / self.done
        share = 100 * self.done / self.total
        return f"{what}, {share:.0f} %, {duration(elapsed).strip()} gone, {duration(left).strip()} left"

    def write(self, line: str) -> None:
        """Show a line; on a terminal in place of the last one."""
        self.stream.write(f"\r\033[K{line}" if self.terminal else f"{line}\n")
        self.stream.flush()

    def close(self) -> None:
        """Take the line away from the terminal."""
        if self.total and self.terminal:
            self.write("")
