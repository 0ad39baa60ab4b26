"""What happens between two log lines: throughput, arithmetic rate, waits, time left.

The meter never makes the host wait for the device: values may be tensors there until `read` fetches all of
them in one transfer. On a GPU the clock is only right because `read` reads it after that transfer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor

Value = float | int | Tensor | None
Reading = dict[str, float | int | None]

RECENT = 20  # log intervals whose median step time predicts the time left


def to_numbers(values: Mapping[str, Value]) -> Reading:
    """Fetch the one-element tensors among `values` to the host, in one transfer."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    numbers: Reading = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    if tensors:
        fetched = torch.stack([t.detach().double().reshape(()) for t in tensors.values()]).tolist()
        for (name, tensor), number in zip(tensors.items(), fetched, strict=True):
            numbers[name] = number if tensor.is_floating_point() else int(number)
    return {name: numbers[name] for name in values}


class Meter:
    """Counts steps, images and seconds, and turns them into the fields of a log line."""

    def __init__(
        self,
        *,
        total_steps: int,
        devices: int = 1,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """The clock starts at the first `data_wait` or `pause`.

        Args:
            total_steps: optimizer steps of the whole run, for the time left.
            devices: how many share the work; FLOP/s are per device.
            peak_flops: of one device, for MFU; None: not known.
            clock: seconds from any origin.
        """
        self.total_steps = total_steps
        self.devices = devices
        self.peak_flops = peak_flops
        self._clock = clock
        self._start = self._last = clock()
        self._started = False
        self._warm = False  # a reading after the first has been taken
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._all_steps = 0
        self._all_paused = 0.0  # since the first step: pauses that will come again
        self._reset()

    def _reset(self) -> None:
        self._steps = self._images = 0
        self.work = 0, 0  # tokens and floating-point operations of this rank since the last reading
        self._waited = self._paused = 0.0

    def _begin(self) -> float:
        now = self._clock()
        if not self._started:
            self._start = self._last = now
            self._started = True
        return now

    @property
    def elapsed(self) -> float:
        """Seconds since the clock started."""
        return self._clock() - self._start if self._started else 0.0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around fetching a batch."""
        begin = self._begin()
        yield
        self._waited += self._clock() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around validation and saving: kept out of the throughput, but part of the time left."""
        begin = self._begin()
        yield
        seconds = self._clock() - begin
        self._paused += seconds
        if self._all_steps:
            self._all_paused += seconds

    def update(self, images: int, work: Iterable[tuple[int, int]] = ()) -> None:
        """One optimizer step is done, on `images` samples over all ranks. `work`: tokens and floating-point
        operations of each of this rank's micro-batches."""
        self._steps += 1
        self._all_steps += 1
        self._images += images
        for tokens, flops in work:
            self.work = self.work[0] + tokens, self.work[1] + flops

    def read(self, step: int, values: Mapping[str, Value], work: Sequence[float] = (0, 0)) -> Reading:
        """The log line after `step`: `values` as numbers, and the figures since the last call.

        `work`: `self.work` summed over all ranks.

        `seconds_per_step`, `images_per_second` and `tokens_per_second` (all ranks), `tflops` (per device),
        `mfu_percent` (None where the device's peak is unknown), `data_seconds_per_step`, `data_percent` of
        the time, `elapsed_seconds` since the start, `seconds_left`.
        """
        assert self._steps, "read() without a step since the last one"
        numbers = to_numbers(values)  # the device is waited for here, and nowhere else
        now = self._clock()
        seconds = max(now - self._last - self._paused, 1e-9)
        tokens, flops = work
        rate = flops / seconds / self.devices
        if self._all_steps > self._steps and not self._warm:
            self._recent.clear()  # the first step compiles, allocates and fills caches: it predicts nothing
            self._warm = True
        self._recent.append(seconds / self._steps)
        reading = {
            "step": step,
            **numbers,
            "seconds_per_step": seconds / self._steps,
            "images_per_second": self._images / seconds,
            "tokens_per_second": tokens / seconds,
            "tflops": rate / 1e12,
            "mfu_percent": 100 * rate / self.peak_flops if self.peak_flops else None,
            "data_seconds_per_step": self._waited / self._steps,
            "data_percent": 100 * self._waited / seconds,
            "elapsed_seconds": now - self._start,
            "seconds_left": self._seconds_left(step),
        }
        self._last = now
        self._reset()
        return reading

    def _seconds_left(self, step: int) -> float:
        """Remaining steps x (median recent step time + pauses per step so far).

        The median forgets the slow first steps (compilation, caches) and single hiccups.
        """
        return (self.total_steps - step) * (median(self._recent) + self._all_paused / self._all_steps)
