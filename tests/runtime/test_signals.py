"""A signal to one rank stops all ranks at the same step; a lost peer is told, not waited for."""

import os
import signal
import time

import pytest
from helpers.ranks import run_ranks

from flux_trainer.runtime import launcher
from flux_trainer.runtime.signals import StopFlag


class Alone:
    size = 1


@pytest.fixture(autouse=True)
def terminal():
    """SIGHUP as in a terminal, for the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_world_of_one_stops_at_once_and_restores_the_handlers(number):
    before = handlers()
    with StopFlag(Alone()) as stop:
        assert not stop.poll()
        assert stop.cause == ""
        os.kill(os.getpid(), number)
        assert stop.poll()
        assert stop.signal_name == number.name
        assert stop.cause == "a signal"
    assert handlers() == before


def test_what_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopFlag(Alone()) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.poll()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_death_of_the_launcher_stops_the_run(monkeypatch):
    monkeypatch.setattr(launcher, "_PARENT", -1)
    with StopFlag(Alone()) as stop:
        assert not stop.poll(), "torchrun did not start this process"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
        assert stop.poll()
        assert stop.cause == "the death of its launcher"


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
                if number:
                    os.kill(os.getpid(), number)
                else:
                    os.environ["TORCHELASTIC_RUN_ID"], launcher._PARENT = "a", -1  # as if it had died
            began = time.perf_counter()
            stopped = stop.poll()
            spent += time.perf_counter() - began
            if stopped:
                assert stop.poll()  # and stays so
                assert stop.cause == ("a signal" if number else "the death of its launcher")
                break
    world.close()
    return step, spent / step


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rank", "number"),
    [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGHUP), (1, 0)],
)
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
