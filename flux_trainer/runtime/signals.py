"""Stopping in step: a signal to any rank makes all ranks stop after the same step.

SIGTERM and SIGINT only raise a flag. `poll`, called once per step, starts an asynchronous maximum of all
flags and returns the one started a step earlier, which every rank has long since joined: nobody waits, and
all ranks read the same answer.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from flux_trainer.runtime import peers
from flux_trainer.runtime.dist import World, peers_alive
from flux_trainer.runtime.log import logger


class StopFlag:
    """Catches SIGTERM and SIGINT while entered; a second SIGINT raises KeyboardInterrupt as usual.

    Enter it on the main thread. On a signal the run goes on for one or two steps until all ranks know; a
    world of one stops at once.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal_name = ""
        self._agreed = False
        self._flags = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __enter__(self) -> StopFlag:
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
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
            self._agree(bool(self.signal_name))
        elif not self._agreed:
            self._collect()
            if not self._agreed:
                self._flags.fill_(bool(self.signal_name))
                with peers_alive("asking for stop signals"):
                    self._pending = dist.all_reduce(
                        self._flags, dist.ReduceOp.MAX, group=self.world.control, async_op=True
                    )
        return self._agreed

    def _collect(self) -> None:
        """Read the maximum that was started last."""
        pending, self._pending = self._pending, None
        if pending is not None:
            peers.mark()
            with peers_alive("asking for stop signals"):
                pending.wait()
            self._agree(bool(self._flags.item()))

    def _agree(self, stop: bool) -> None:
        if stop and not self._agreed:
            logger.info(f"{self.signal_name or 'A signal to another rank'}: stopping after this step")
        self._agreed = stop

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
