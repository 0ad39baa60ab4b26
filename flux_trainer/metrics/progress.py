"""How far a piece of work is and how long it will still take: a line that a terminal redraws."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from flux_trainer.metrics.console import duration

ON_TERMINAL, IN_FILE = 0.2, 10.0  # seconds between lines


class Progress:
    """On a terminal it redraws its line, elsewhere it writes one now and then."""

    def __init__(self, shown: bool = True, stream: TextIO | None = None) -> None:
        self.shown = shown
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.start = self.last = time.monotonic()

    def show(self, done: float, total: float, what: str) -> None:
        """`done` of `total` is done, in any unit; `what` says in words how far that is."""
        now = time.monotonic()
        due = done == total or now - self.last >= (ON_TERMINAL if self.terminal else IN_FILE)
        if self.shown and done and due:
            self.last = now
            self.write(self.line(done / total, what, now - self.start))

    def line(self, share: float, what: str, elapsed: float) -> str:
        """`3 of 8 pictures, 41 %, 0:12 gone, 0:17 left`."""
        left = elapsed * (1 - share) / share
        return f"{what}, {100 * share:.0f} %, {duration(elapsed).strip()} gone, {duration(left).strip()} left"

    def write(self, line: str) -> None:
        """Show a line; on a terminal in place of the last one."""
        self.stream.write(f"\r\033[K{line}" if self.terminal else f"{line}\n")
        self.stream.flush()

    def close(self) -> None:
        """Take the line away from the terminal."""
        if self.shown and self.terminal:
            self.write("")
