"""How a command on many ranks ends: what a person can mend becomes a sentence, and every rank learns."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.runtime import launcher, peers
from flux_trainer.runtime.dist import tells_of_lost_peer
from flux_trainer.runtime.files import sentence
from flux_trainer.runtime.interrupt import INTERRUPTED
from flux_trainer.runtime.log import logger


def exit_status(run: Callable[[], None]) -> int:
    """Call `run`; returns 0, 1 after a mistake or a loss that a sentence can tell of, 130 after Ctrl-C.

    The launcher learns of every error, from any rank. Errors of our own making are raised.
    """
    handler = get_error_handler()
    handler.initialize()
    try:
        run()
    except BaseException as error:
        if tells_of_lost_peer(error):
            who = peers.lost() or "Another rank is gone or hung."
            launcher.tell(who, second_hand=True)
            logger.error(f"{who} This one ends without saving. It noticed by: {error}")
        elif isinstance(error, (ValueError, OSError, CheckpointError)):
            what = sentence(error)
            peers.failed(what)
            launcher.tell(what)
            logger.error(what)
        elif isinstance(error, KeyboardInterrupt):
            peers.failed("It was interrupted.")
            logger.error("Interrupted.")
            return INTERRUPTED
        else:
            peers.failed(f"{type(error).__name__}: {error}")
            handler.record_exception(error)
            raise
        return 1
    return 0
