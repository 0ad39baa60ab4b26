"""The console format: aligned, rank 0 from INFO on, colours on terminals only."""

import io
import re

import pytest

from flux_trainer.runtime.log import init_logger, logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def lines(rank: int, stream: io.StringIO, colour: bool = True) -> list[str]:
    init_logger(rank, colour, stream)
    logger.info("loss 0.5")
    logger.warning("disk nearly full")
    return stream.getvalue().splitlines()


def test_rank_0_tells_all_with_time_and_level_aligned():
    first, second = lines(0, io.StringIO())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO     loss 0\.5", first)
    assert second.endswith(" WARNING  disk nearly full")
    assert first.index("loss") == second.index("disk")


def test_other_ranks_only_warn_and_say_who_they_are():
    (line,) = lines(3, io.StringIO())
    assert line.endswith(" WARNING  [rank 3] disk nearly full")


def test_colours_on_a_terminal_unless_refused(monkeypatch):
    assert "\033[33m" in "".join(lines(0, Terminal()))
    assert "\033" not in "".join(lines(0, Terminal(), colour=False))
    assert "\033" not in "".join(lines(0, io.StringIO()))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\033" in "".join(lines(0, io.StringIO()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in "".join(lines(0, Terminal()))


def test_a_second_init_does_not_double_the_lines():
    lines(0, io.StringIO())
    assert len(lines(0, io.StringIO())) == 2
