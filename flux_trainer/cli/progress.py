"""How far a long piece of work is, on standard error: one line on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_EVERY = {True: 0.2, False: 15.0}  # seconds between lines, on a terminal or not


class Progress:
    """Call it with (done, total) in bytes."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.terminal = sys.stderr.isatty()
        self.start = self.last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last < _EVERY[self.terminal] and done < total:
            return
        self.last = now
        seconds = now - self.start
        left = seconds * (total - done) / done if done else 0.0
        line = (
            f"{self.what}: {100 * done / max(total, 1):3.0f} % of {total / 1e9:.3g} GB, "
            f"{done / max(seconds, 1e-9) / 1e9:.2f} GB/s, {left:.0f} s left"
        )
        if self.terminal:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            print(file=sys.stderr)
