"""The time of training steps that take turns in one process, and of their parts: for `end_to_end.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest import mock

import torch
from startup_probe import Clock

DATA, ENCODERS, MODEL, REST = "data", "encoders", "forward and backward", "optimizer and all else"
WARM = 2
"""Rounds that do not count."""


@dataclass
class Times:
    """Of one contestant, round by round."""

    steps: list[float] = field(default_factory=list)
    """Seconds."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each part of a step."""


@dataclass
class Contestant:
    """Someone who trains: `load` a batch, `train` on it."""

    name: str
    load: Callable[[], Any]
    train: Callable[[Any], None]
    parts: list[tuple[str, Any, str]]
    """A part of `train`, the object that has the function which does it, that function's name."""


def take_turns(contestants: list[Contestant], rounds: int, device: torch.device) -> dict[str, Times]:
    """Times of `rounds` steps of each and of their parts.

    On a GPU the borders between parts wait for the device, which steps otherwise do not: there, parts are
    timed in as many rounds of their own.
    """
    times = {contestant.name: Times() for contestant in contestants}
    steps_end = WARM + rounds
    parts_begin = steps_end if device.type == "cuda" else WARM
    gc.disable()  # as a trainer does, which collects every 50 steps
    for round_ in range(parts_begin + rounds):
        for contestant in contestants[:: 1 if round_ % 2 else -1]:
            kept = times[contestant.name]
            synchronize(device)
            start = time.perf_counter()
            with timed_parts(contestant, device, kept.parts) if round_ >= parts_begin else untimed() as part:
                with part(DATA):
                    batch = contestant.load()
                contestant.train(batch)
            synchronize(device)
            if WARM <= round_ < steps_end:
                kept.steps.append(time.perf_counter() - start)
    gc.enable()
    return times


Part = Callable[[str], AbstractContextManager[None]]


def untimed() -> AbstractContextManager[Part]:
    return nullcontext(lambda _: nullcontext())


@contextmanager
def timed_parts(contestant: Contestant, device: torch.device, kept: dict[str, list[float]]) -> Iterator[Part]:
    """Add the seconds of a step's parts to `kept`; what belongs to no part is REST."""
    clock = DeviceClock(device)
    with ExitStack() as stack:
        for part, owner, name in contestant.parts:
            stack.enter_context(mock.patch.object(owner, name, clock.charged(part, getattr(owner, name))))
        yield clock.part
    clock.charge()
    for part, seconds in clock.seconds.items():
        kept.setdefault(part, []).append(seconds)


class DeviceClock(Clock):
    """A clock that waits for the device before it looks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(time.monotonic(), REST)
        self.device = device

    def charge(self) -> None:
        synchronize(self.device)
        super().charge()

    def charged(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time charged to `part`."""

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return call(*args, **kwargs)

        return timed


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
