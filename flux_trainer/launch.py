"""The launcher of a job's ranks: torchrun, but its last word is the sentence by which a rank failed.

    python -m flux_trainer.launch --nproc-per-node 8 -m flux_trainer.train --job.config_file my.toml

takes torchrun's arguments. torchrun itself ends a failed job with a traceback of its own, which hides that
sentence. And where nohup has SIGHUP ignored, it stays ignored here.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flux_trainer.runtime.interrupt import INTERRUPTED, obeyed
from flux_trainer.runtime.launcher import SECOND_HAND
from flux_trainer.runtime.log import init_logger, logger

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks as torchrun's arguments say, and wait for them.

    Returns:
        The job's exit status: that of the rank that failed first, or 128 + N where signal N ended it.
    """
    init_logger()
    try:
        return _launch(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # there were no ranks yet
        logger.error("Interrupted.")
        return INTERRUPTED


def _launch(argv: Sequence[str]) -> int:
    # Here, for they take seconds, and Ctrl-C in these is to be no traceback.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_news)
    args = run.parse_args(argv)
    args.signals_to_handle = ",".join([*(number.name for number in obeyed()), "SIGQUIT"])
    try:
        run.run(args)
    except ChildFailedError as error:
        rank, failure = first_failure(error.failures)
        if args.nproc_per_node != "1" or not report(failure):  # else it has just said it in this terminal
            logger.error(last_word(rank, failure))
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:  # the ranks were told, and have ended
        return 128 + error.sigval
    except RendezvousError as error:
        why = str(error.__cause__ or error).partition("\n")[0]
        logger.error(
            f"The launcher at {args.rdzv_endpoint} cannot be reached ({why}). If the job had started, it has "
            "ended there: see its own last line."
        )
        return 1
    return 0


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank whose failure says most of why the job failed.

    One with an error of its own; else one that knows of another rank; else one that was killed. Times are in
    whole seconds, which do not tell a cause from its consequence.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, bool, bool, int, int]:
        rank, failure = item
        known = report(failure)
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # that is the launcher's
        return not known, bool(known.get(SECOND_HAND)), not killed, failure.timestamp, rank

    return min(failures.items(), key=order)


def report(failure: ProcessFailure) -> dict[str, Any]:
    """What the rank has left about its end (`runtime.launcher.tell`, torch's `record`); empty: nothing."""
    message: Any = failure.error_file_data.get("message")
    return dict(message["extraInfo"]) if isinstance(message, dict) else {}


def last_word(rank: int, failure: ProcessFailure) -> str:
    """Why a rank failed: its own sentence, or the traceback of a bug."""
    if known := report(failure):
        text: str = known["py_callstack"]
        return text if known.get(SECOND_HAND) else f"Rank {rank} failed: {text}"
    if failure.exitcode > 0:
        return f"Rank {rank} ended with exit status {failure.exitcode}."
    killed = f"Rank {rank} was killed by {failure.signal_name()}."
    return killed + " Is the machine short of memory?" * (failure.exitcode == -signal.SIGKILL)


def _is_news(record: logging.LogRecord) -> bool:
    """False for torchrun's line about a failed rank: the last word says the same."""
    return not str(record.msg).startswith("failed (exitcode")


if __name__ == "__main__":
    sys.exit(main())
