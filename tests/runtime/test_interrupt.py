"""Stop signals as an interruption, for commands that have nothing to save."""

import os
import signal
import threading

import pytest

from flux_trainer.runtime.interrupt import STOP_SIGNALS, interrupting, obeyed


@pytest.fixture(autouse=True)
def terminal():
    """SIGHUP as in a terminal, for the tests themselves may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_of_them_interrupts_and_is_remembered(number):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with interrupting() as asked:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert asked == [number]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_second_one_does_not_interrupt_the_cleaning_up():
    """bash sends two when its terminal closes; Ctrl-C, though, is a person's wish."""
    with interrupting() as asked:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)  # while it cleans up
        assert asked == [signal.SIGHUP] * 2
    with interrupting():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored():
    """SIGHUP by nohup, SIGINT by a script for its jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert signal.SIGINT not in obeyed()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert obeyed() == [signal.SIGTERM, signal.SIGINT]
    with interrupting() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked == []


def test_other_threads_may_enter_it():
    entered = []

    def work():
        with interrupting() as asked:
            entered.append(asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [[]]
