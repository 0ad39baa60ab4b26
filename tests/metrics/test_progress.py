"""The line of progress: shares and times add up, a terminal redraws it, a file gets one now and then."""

import io

import pytest

from flux_trainer.metrics import progress
from flux_trainer.metrics.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_terminals_line_is_redrawn_and_taken_away(clock):
    stream = Terminal()
    shown = Progress(stream=stream)
    clock[0] += 20
    shown.show(2, 8, "1 of 4 pictures")
    assert stream.getvalue() == "\r\x1b[K1 of 4 pictures, 25 %, 0:20 gone, 1:00 left"
    shown.show(4, 8, "2 of 4 pictures")  # at the same moment
    assert "2 of 4" not in stream.getvalue()
    shown.close()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_a_file_gets_a_line_now_and_then(clock):
    stream = io.StringIO()
    shown = Progress(stream=stream)
    for done in range(1, 101):
        clock[0] += 0.5
        shown.show(done, 100, "x")
    shown.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[-1] == "x, 100 %, 0:50 gone, 0:00 left"


def test_ranks_without_work_to_show_are_silent(clock):
    stream = Terminal()
    shown = Progress(shown=False, stream=stream)
    clock[0] += 20
    shown.show(2, 8, "x")
    shown.close()
    assert stream.getvalue() == ""
