"""How a command on many ranks ends: what a person can mend becomes a sentence, and every rank learns."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import record

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.runtime import peers
from flux_trainer.runtime.dist import tells_of_lost_peer
from flux_trainer.runtime.log import logger

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended, as shells have it: 128 + SIGINT."""


def exit_status(run: Callable[[], None]) -> int:
    """Call `run`; returns 0, 1 after a mistake or a loss that a sentence can tell of, 130 after Ctrl-C.

    torchrun learns of every error, from any rank. Errors of our own making are raised.
    """
    try:
        record(run)()
    except BaseException as error:
        if tells_of_lost_peer(error):
            who = peers.lost() or "Another rank is gone or hung."
            logger.error(f"{who} This one ends without saving. It noticed by: {error}")
        elif isinstance(error, (ValueError, OSError, CheckpointError)):
            peers.failed(str(error))
            logger.error(str(error))
        elif isinstance(error, KeyboardInterrupt):
            peers.failed("It was interrupted.")
            logger.error("Interrupted.")
            return INTERRUPTED
        else:
            peers.failed(f"{type(error).__name__}: {error}")
            raise
        return 1
    return 0
