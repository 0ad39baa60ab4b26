"""Stopping in step: a signal to any rank, or the death of its launcher, stops all ranks after the same step.

SIGTERM, SIGINT and SIGHUP only raise a flag. `poll`, called once per step, starts an asynchronous maximum of
all flags and returns the one started a step earlier, which every rank has long since joined: nobody waits,
and all ranks read the same answer.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from flux_trainer.runtime import launcher, peers
from flux_trainer.runtime.dist import World, peers_alive
from flux_trainer.runtime.interrupt import obeyed
from flux_trainer.runtime.log import logger

CAUSES = ("", "a signal", "the death of its launcher")
"""What can stop a run, by the number that ranks send each other."""
_SIGNAL, _LAUNCHER = 1, 2


class StopFlag:
    """Catches the stop signals while entered; a second SIGINT raises KeyboardInterrupt as usual.

    Enter it on the main thread. On a signal the run goes on for one or two steps until all ranks know; a
    world of one stops at once. Signals that are ignored already, such as SIGHUP by nohup, stay ignored.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal_name = ""
        """The signal that has come to this rank; empty: none."""
        self._agreed = 0  # a number of CAUSES
        self._flags = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    @property
    def cause(self) -> str:
        """What stops the run, in words; empty: nothing."""
        return CAUSES[self._agreed]

    def __enter__(self) -> StopFlag:
        self._previous = {number: signal.signal(number, self._on_signal) for number in obeyed()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:  # otherwise a peer may be gone, and the last maximum may never be known
            self._collect()

    def poll(self) -> bool:
        """Whether to stop after this step. Every rank calls it once per step, and gets the same answer.

        Raises:
            PeerLost: another rank is gone, or has not come within the control group's timeout.
        """
        if self.world.size == 1:
            self._agree(self._own_cause())
        elif not self._agreed:
            self._agree(self._collect())
            if not self._agreed:
                self._flags.fill_(self._own_cause())
                with peers_alive("asking for stop signals"):
                    self._pending = dist.all_reduce(
                        self._flags, dist.ReduceOp.MAX, group=self.world.control, async_op=True
                    )
        return bool(self._agreed)

    def _own_cause(self) -> int:
        return _SIGNAL if self.signal_name else _LAUNCHER if launcher.is_gone() else 0

    def _collect(self) -> int:
        """The maximum that was started last; 0 if none was."""
        pending, self._pending = self._pending, None
        if pending is None:
            return 0
        peers.mark()
        with peers_alive("asking for stop signals"):
            pending.wait()
        return int(self._flags.item())

    def _agree(self, cause: int) -> None:
        if cause and not self._agreed:
            logger.info(f"{self._news(cause)}: stopping after this step")
        self._agreed = cause

    def _news(self, cause: int) -> str:
        if cause == _LAUNCHER:
            return "The launcher of this rank or another has died"
        return self.signal_name or "A signal to another rank"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
