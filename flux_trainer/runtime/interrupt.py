"""The signals that ask a process to stop, and how a command with nothing to save obeys them. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Of schedulers and service managers, of Ctrl-C, and of a terminal or connection that closes."""
INTERRUPTED = 130
"""Exit status of a command that one of them has interrupted, as shells have it for Ctrl-C: 128 + SIGINT."""


def obeyed() -> list[signal.Signals]:
    """Those of the stop signals that are not ignored already: by nohup, or by a script for its jobs."""
    return [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def ignore() -> None:
    """Ignore all of them: for processes whose parent decides when they end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def interrupting() -> Iterator[list[int]]:
    """Within the context, all of them do what Ctrl-C does: raise KeyboardInterrupt.

    Yields the signals that have come so far, for C code may swallow the exception or make another of it. On
    threads other than the main one, which get no signals, nothing changes.
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == 1 or number == signal.SIGINT:  # a closed terminal sends two: the second must not
            raise KeyboardInterrupt  # interrupt what the first has begun to clean up

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, interrupt) for number in obeyed()}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
