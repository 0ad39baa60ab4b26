"""Errors of checkpoints, and doing a thing on all ranks so that one rank's error reaches every rank.

The errors are needed without torch, which is imported only where ranks speak to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from flux_trainer.runtime.files import sentence

if TYPE_CHECKING:
    import torch.distributed as dist

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says why, where, and what to do."""


class DamagedError(CheckpointError):
    """A checkpoint's files are not those that were written."""


def together(group: dist.ProcessGroup | None, work: Callable[[], T]) -> list[T]:
    """Call `work` on every rank of `group`; return all results in rank order.

    Raises:
        CheckpointError: on every rank, when `work` failed on any: no rank is left waiting for another.
    """
    from flux_trainer.runtime.dist import all_gather

    cause, result = None, None
    try:
        result = work()
    except Exception as error:
        cause = error
    problem = (
        cause if cause is None or isinstance(cause, CheckpointError) else CheckpointError(_sentence(cause))
    )
    answers = all_gather((problem, result), group)
    for their_problem, _ in answers:
        if their_problem is not None:
            raise type(their_problem)(str(their_problem)) from cause
    return [result for _, result in answers]  # type: ignore[misc]


def _sentence(error: Exception) -> str:
    return sentence(error) if isinstance(error, OSError) else repr(error)


def on_first(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """Call `work` on the first rank of `group` alone; every rank returns its result or raises its error."""
    import torch.distributed as dist

    first = group is None or dist.get_rank(group) == 0
    return together(group, lambda: work() if first else None)[0]  # type: ignore[return-value]
