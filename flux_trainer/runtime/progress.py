"""How far a rank has come, and what its process does: what its watcher reads without asking it.

A rank writes into memory that it shares with its watcher: no call of the system, no lock. So the watcher
knows of a rank that can no longer speak. No torch is imported here.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from dataclasses import dataclass

_CELLS = 4  # float64: step, count of marks in it, time of the last one, patience


class Progress:
    """Marks in shared memory: one process makes them, another reads them by the same file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._cells = memoryview(mmap.mmap(fd, 8 * _CELLS)).cast("d")

    @classmethod
    def create(cls) -> Progress:
        """Memory of its own, at step 0."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("progress")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, 8 * _CELLS)
        progress = cls(fd)
        progress.mark(0)
        return progress

    def mark(self, step: int | None = None) -> None:
        """Say that something is done: one more thing of this step, or all before `step`."""
        cells = self._cells
        if step is None:
            cells[1] += 1
        else:
            cells[0], cells[1] = step, 0
        cells[2] = time.monotonic()  # one clock for all processes of a machine

    @property
    def place(self) -> tuple[int, int]:
        """Step and marks within it; ranks that work on the same things can be compared by it."""
        return int(self._cells[0]), int(self._cells[1])

    @property
    def idle(self) -> float:
        """Seconds since the last mark."""
        return time.monotonic() - self._cells[2]

    @property
    def patience(self) -> float:
        """Seconds that this rank waits for others."""
        return self._cells[3]

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._cells[3] = seconds


@dataclass(frozen=True)
class Look:
    """One look at a process. Two of them tell what it does."""

    state: str
    """Its letter in /proc, of the main thread; empty where there is no /proc."""
    cpu: float
    """Seconds of processor time that it has had, with all its threads."""
    when: float

    @classmethod
    def at(cls, process: int) -> Look:
        try:
            with open(f"/proc/{process}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
        except OSError:
            return cls("", 0.0, time.monotonic())
        ticks = int(fields[11]) + int(fields[12])  # in user mode, in the kernel
        return cls(fields[0].decode(), ticks / os.sysconf("SC_CLK_TCK"), time.monotonic())

    def until(self, later: Look) -> str:
        """What the process did between two looks: stopped, busy, asleep, or nothing that is known."""
        if not (self.state and later.state):
            return ""
        if self.state == later.state == "T":
            return STOPPED
        ready = self.state == later.state == "R"  # where other programs have the processor, it gets little
        if ready or later.cpu - self.cpu > (later.when - self.when) / 2:
            return "busy"  # computes, or waits for a GPU
        return "in a call of the kernel" if self.state == later.state == "D" else "asleep"


STOPPED = "stopped"
"""By SIGSTOP or its like: the one state of a process that proves that it stands still."""
