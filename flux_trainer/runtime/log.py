"""The one logger of a run: `logger`, dressed for the console by `init_logger`. No torch."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

logger = logging.getLogger("flux_trainer")

_COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}
_GREY, _PLAIN = "\033[90m", "\033[0m"


class _Formatter(logging.Formatter):
    """`2025-01-31 12:00:00 INFO     text`, with `[rank 3]` before the text of every rank but 0."""

    def __init__(self, rank: int, colour: bool) -> None:
        prefix = f"[rank {rank}] " if rank else ""
        super().__init__(f"%(asctime)s %(levelname)-8s {prefix}%(message)s", "%Y-%m-%d %H:%M:%S")
        self.colour = colour

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if not self.colour:
            return text
        if record.levelno in _COLOURS:
            return f"{_COLOURS[record.levelno]}{text}{_PLAIN}"
        head = len(self.formatTime(record, self.datefmt))
        return f"{_GREY}{text[:head]}{_PLAIN}{text[head:]}"


def init_logger(rank: int = 0, colour: bool = True, stream: TextIO | None = None) -> None:
    """Send the logger's lines to `stream` (standard error): rank 0 from INFO on, the others from WARNING on.

    Colours appear on a terminal only, unless FORCE_COLOR is set; never when `colour` is false or NO_COLOR
    is set. Calling it again replaces what an earlier call set up.
    """
    stream = stream or sys.stderr
    terminal = stream.isatty() or bool(os.environ.get("FORCE_COLOR"))
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Formatter(rank, colour and terminal and not os.environ.get("NO_COLOR")))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
