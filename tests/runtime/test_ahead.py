"""One item ahead: the order on the host, what runs after what on the device, and what memory that needs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers.streams import FakeStream, FakeStreams

from flux_trainer.runtime.ahead import one_ahead

CUDA = torch.device("cuda")


class Item:
    """Made on a stream, as the work of that number."""

    def __init__(self, number: int, stream: FakeStream) -> None:
        self.number, self.stream, self.work = number, stream, stream.work()


class Run:
    """Makes and uses items, and keeps what happened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.streams = FakeStreams(monkeypatch)
        self.order: list[str] = []
        self.used: dict[int, int] = {}
        """By item: the number of its use among the main stream's work."""
        self.free: set[int] = set()
        """Items whose memory may be taken again."""
        self.waited: list[tuple[int, set[int]]] = []
        """When each item was made: the main stream's work that was certainly done, and the free items."""
        for item in one_ahead(self.items(count), CUDA):
            assert self.streams.current is self.streams.main
            assert self.streams.main.knows(item.stream) >= item.work, "used before it was there"
            self.order.append(f"use {item.number}")
            self.used[item.number] = self.streams.main.work()
            del item  # its user lets go early

    def items(self, count: int) -> Iterator[Item]:
        for number in range(count):
            stream = self.streams.current
            self.order.append(f"make {number}")
            self.waited.append((stream.knows(self.streams.main), set(self.free)))
            item = Item(number, stream)
            weakref.finalize(item, self.free.add, number)
            yield item
            del item


def test_each_is_made_before_the_one_ahead_is_used(monkeypatch):
    order = ["make 0", "make 1", "use 0", "make 2", "use 1", "make 3", "use 2", "use 3"]
    assert Run(monkeypatch, 4).order == order


def test_making_waits_for_no_use_but_of_items_whose_memory_is_free(monkeypatch):
    run = Run(monkeypatch, 6)
    for number, (waited, free) in enumerate(run.waited):
        assert all(run.used[other] <= waited for other in free), "written while it is read"
        if number >= 2:
            assert waited < run.used[number - 2], "its making waits for the step that has just been issued"
    assert [len(free) for _, free in run.waited] == [0, 0, 0, 1, 2, 3], "memory grows"


def test_few_items_and_none(monkeypatch):
    assert Run(monkeypatch, 0).order == []
    assert Run(monkeypatch, 1).order == ["make 0", "use 0"]


def test_what_goes_wrong_in_the_making_is_told(monkeypatch):
    FakeStreams(monkeypatch)

    def items() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("no more")

    given = one_ahead(items(), CUDA)
    assert next(given) == 0
    with pytest.raises(ValueError, match="no more"):
        next(given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
def test_on_a_gpu_nothing_is_written_while_it_is_read():
    """The main stream is slow: it reads each item long after the host has let go of it."""

    def items() -> Iterator[torch.Tensor]:
        for number in range(12):
            yield torch.full((1 << 20,), number, device=CUDA)

    right = []
    for number, item in enumerate(one_ahead(items(), CUDA)):
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        right.append((item == number).all())
        del item
    assert all(x.item() for x in right)
    assert len(right) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
def test_on_a_gpu_making_and_using_take_the_time_of_one():
    def items() -> Iterator[int]:
        for number in range(10):
            torch.cuda._sleep(50_000_000)
            yield number

    def milliseconds(given: Iterator[int]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in given:
            torch.cuda._sleep(50_000_000)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    milliseconds(items())  # the clock rises
    assert milliseconds(one_ahead(items(), CUDA)) < 0.75 * milliseconds(items())
