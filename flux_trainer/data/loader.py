"""Loading: worker processes that turn positions into batches ahead of time.

The order of samples is a function of the draw (sampler.py), so a loader is started at a draw and has no state
but the draw it has reached. Of every global batch of G = R * n draws, rank r of R gets [r * n, (r + 1) * n).
Where S ranks work on the same n samples, each of them loads a part, all parts of ceil(n / S) samples.
"""

from __future__ import annotations

import atexit
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import count
from multiprocessing.connection import wait
from typing import Protocol

from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from flux_trainer.config.schema import Data
from flux_trainer.data.bad import DataError
from flux_trainer.data.samples import Batch, Sample, ValidationSamples
from flux_trainer.runtime import interrupt


class Samples(Protocol):
    """Anything that has a sample for every position."""

    def get(self, i: int) -> Sample: ...


Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]
"""Captions to ids [B, ...] for each text encoder."""


class _Batches:
    """What a worker does: a batch for a sequence of positions.

    An error in the data travels as a value, so that it arrives without the worker's traceback around it.
    """

    def __init__(self, samples: Samples, tokenize: Tokenize | None) -> None:
        self.samples, self.tokenize = samples, tokenize

    def __getitem__(self, positions: Sequence[int]) -> Batch | DataError:
        try:
            batch = Batch.of([self.samples.get(i) for i in positions])
        except DataError as error:
            return error
        if self.tokenize:
            batch.tokens = self.tokenize(batch.captions)
        return batch


class Workers:
    """An iterator over the batches of given positions, loaded by `num_workers` processes (0: by this one).

    Each worker loads whole batches and keeps `prefetch_factor` of them ready. `close` ends the processes.
    """

    def __init__(
        self,
        samples: Samples,
        positions: Iterable[Sequence[int]],
        *,
        num_workers: int,
        prefetch_factor: int,
        pin_memory: bool = False,
        tokenize: Tokenize | None = None,
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # a call inside torchdata 0.11
            loader = StatefulDataLoader(
                _Batches(samples, tokenize),
                batch_size=None,  # one item of `positions` is one batch
                sampler=positions,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor if num_workers else None,
                pin_memory=pin_memory,
                worker_init_fn=ignore_stop_signals,
            )
        # torch would raise the death of a worker from a signal handler, anywhere in the program. Without that
        # handler it is found where a batch is awaited.
        handler = signal.getsignal(signal.SIGCHLD)
        self._batches = iter(loader)
        signal.signal(signal.SIGCHLD, handler)
        self._processes = list(getattr(self._batches, "_workers", []))
        # Workers do not obey SIGTERM, by which Python ends them at its exit: it would wait for ever.
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:  # what a dead worker looks like from here
            ended = wait([process.sentinel for process in self._processes], timeout=1)
            if not ended:
                raise
            self.close()
            raise DataError(
                "A process that loads data died. Often the machine is short of memory (take fewer "
                "data.num_workers or a smaller data.prefetch_factor) or of shared memory (/dev/shm)."
            ) from error
        if isinstance(batch, DataError):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """End the processes, by force after a few seconds. May be called twice."""
        if self._processes:
            self._batches._shutdown_workers()
        for process in self._processes:
            if process.is_alive():
                process.kill()
        self._processes = []
        atexit.unregister(self.close)


def ignore_stop_signals(worker: int) -> None:
    """A stop signal often goes to the whole process group; the main process saves, then ends its workers."""
    interrupt.ignore()


class TrainLoader:
    """This rank's batches, one for each optimizer step, without end. Close it after use.

    Args:
        rank: number of the group of ranks that work on the same samples, among `world_size` such groups.
        shared_rank: number of this rank in its group of `shared_size`. Where the group's samples do not
            divide, its last sample fills up the parts of its last ranks.
    """

    def __init__(
        self,
        section: Data,
        samples: Samples,
        *,
        start_draw: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        shared_rank: int = 0,
        shared_size: int = 1,
        pin_memory: bool = False,
        tokenize: Tokenize | None = None,
    ) -> None:
        if global_batch_size % world_size:
            raise ValueError(
                f"training.global_batch_size = {global_batch_size} is no multiple of the {world_size} ranks "
                "(or groups of ranks that share samples)."
            )
        n = global_batch_size // world_size
        part = -(-n // shared_size)
        mine = [rank * n + min(i, n - 1) for i in range(shared_rank * part, (shared_rank + 1) * part)]
        starts = count(start_draw, global_batch_size)
        self._workers = Workers(
            samples,
            ([start + i for i in mine] for start in starts),
            num_workers=section.num_workers,
            prefetch_factor=section.prefetch_factor,
            pin_memory=pin_memory,
            tokenize=tokenize,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._workers)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()


class ValidationLoader:
    """This rank's share of the validation samples; every iteration passes over it once.

    Rank r of R takes samples r, r + R, ... All ranks make the same number of batches, all of `batch_size`;
    what fills them up is not `valid`.
    """

    def __init__(
        self,
        section: Data,
        samples: ValidationSamples,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        pin_memory: bool = False,
        tokenize: Tokenize | None = None,
    ) -> None:
        self.section, self.samples = section, samples
        self.pin_memory, self.tokenize = pin_memory, tokenize
        stride = batch_size * world_size  # samples in one batch of all ranks
        firsts = range(rank, rank + stride * -(-samples.count // stride), stride)
        self.positions = [range(first, first + stride, world_size) for first in firsts]

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        workers = Workers(
            self.samples,
            self.positions,
            num_workers=self.section.num_workers,
            prefetch_factor=self.section.prefetch_factor,
            pin_memory=self.pin_memory,
            tokenize=self.tokenize,
        )
        with closing(workers):
            yield from workers
