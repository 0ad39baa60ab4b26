"""A signal to one rank stops all ranks at the same step; a lost peer is told, not waited for."""

import os
import signal
import time

import pytest
from helpers.ranks import run_ranks

from flux_trainer.runtime.signals import StopFlag


class Alone:
    size = 1


def test_a_world_of_one_stops_at_once_and_restores_the_handlers():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag(Alone()) as stop:
        assert not stop.poll()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.poll()
        assert stop.signal_name == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_interrupt_interrupts():
    with StopFlag(Alone()) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def train(signalled_rank: int, signalled_step: int, number: int) -> tuple[int, float]:
    """Steps until the stop, and the mean seconds of a poll."""
    from flux_trainer.runtime.dist import init_distributed

    world = init_distributed(30)
    spent = 0.0
    with StopFlag(world) as stop:
        for step in range(1, 201):
            if world.rank == 1 and step % 10 == 0:
                time.sleep(0.002)  # ranks are never quite in step
            if (world.rank, step) == (signalled_rank, signalled_step):
                os.kill(os.getpid(), number)
            began = time.perf_counter()
            stopped = stop.poll()
            spent += time.perf_counter() - began
            if stopped:
                assert stop.poll()  # and stays so
                break
    world.close()
    return step, spent / step


@pytest.mark.distributed
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)])
def test_all_ranks_stop_after_the_step_that_follows_the_signal(rank, number):
    steps = [step for step, _ in run_ranks(2, train, rank, 30, number)]
    assert steps == [31, 31]


@pytest.mark.distributed
def test_no_signal_no_stop():
    assert [step for step, _ in run_ranks(2, train, -1, 0, 0)] == [200, 200]


def train_with_a_death() -> str:
    from flux_trainer.runtime.dist import PeerLost, init_distributed

    world = init_distributed(30)
    began = time.monotonic()
    with StopFlag(world) as stop:
        for step in range(1000):
            if (world.rank, step) == (1, 5):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                stop.poll()
            except PeerLost as error:
                assert time.monotonic() - began < 5
                return str(error)
    return "went on"


@pytest.mark.distributed
def test_the_survivor_of_a_killed_peer_learns_of_it():
    assert "noticed while asking for stop signals" in run_ranks(2, train_with_a_death, lost={1})[0]
