"""CUDA streams without CUDA: what runs after what, by vector clocks (Fidge 1988; Mattern 1989).

A stream counts what it has done; its clock holds, for each stream, how much of that one's work is certainly
behind it. An event is a copy of a clock, and who waits for it knows what it knew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class FakeStream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device: object = None) -> None:
        self.clock: dict[FakeStream, int] = {self: 0}

    def work(self) -> int:
        """Do something; returns its number."""
        self.clock[self] += 1
        return self.clock[self]

    def knows(self, other: FakeStream) -> int:
        """The number of the last work of `other` that is certainly done before what this one does next."""
        return self.clock.get(other, 0)

    def record_event(self) -> dict[FakeStream, int]:
        return dict(self.clock)

    def wait_event(self, event: dict[FakeStream, int]) -> None:
        for stream, count in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)


class FakeStreams:
    """The streams of a device; the last one entered is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = FakeStream()
        self.entered = [self.main]
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "stream", self._enter)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)

    @property
    def current(self) -> FakeStream:
        return self.entered[-1]

    @contextmanager
    def _enter(self, stream: FakeStream) -> Iterator[None]:
        self.entered.append(stream)
        yield
        self.entered.pop()
