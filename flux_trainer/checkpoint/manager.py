"""The checkpoints of a run: when to write, where, how many to keep, and which one to go on from.

A checkpoint is one flat dict of tensors (parameters by native name, `optimizer.state.<name>.<key>`,
`ema.<name>`) and a small JSON state. `commit.py` says when a folder counts as whole, `tensors.py` how
tensors travel.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_trainer.checkpoint import commit
from flux_trainer.checkpoint.commit import METADATA, STATE
from flux_trainer.checkpoint.errors import CheckpointError, DamagedError, on_first, together
from flux_trainer.checkpoint.load import load_run, verify
from flux_trainer.checkpoint.metadata import read_metadata
from flux_trainer.checkpoint.plan import Tensors
from flux_trainer.checkpoint.tensors import HostCopies, total_bytes, write_tensors
from flux_trainer.config.schema import Checkpoint
from flux_trainer.runtime.dist import World
from flux_trainer.runtime.files import ensure_space, sync, write_text
from flux_trainer.runtime.layout import WHOLE, Layouts
from flux_trainer.runtime.log import logger


@dataclass(frozen=True)
class Saved:
    """What a save cost."""

    step: int
    bytes: int
    blocked_seconds: float
    """Training waited this long, for an earlier save included."""
    total_seconds: float
    """From the call of `save` until the checkpoint counted."""


class CheckpointManager:
    """Writes and reads the checkpoints in `dump_folder / section.folder`.

    Every rank makes the same calls, each with the tensors that it holds: all of them, or those of its
    pipeline stage, whole or in parts.
    """

    def __init__(
        self, section: Checkpoint, dump_folder: str | Path, world: World, layouts: Layouts = WHOLE
    ) -> None:
        """layouts: of the parameters that tensor parallelism shares out, by native name."""
        self.section = section
        self.folder = Path(dump_folder) / section.folder
        self.layouts = layouts
        self.group = world.checkpoint
        self.rank = world.rank
        self.last: Saved | None = None
        """The newest finished save."""
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        if section.enable:
            on_first(self.group, self._open)

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        sync(self.folder.parent)
        commit.tidy(self.folder)

    # Writing

    def save(self, step: int, tensors: Tensors, state: Mapping[str, Any]) -> float:
        """Write the checkpoint of `step`; returns how many seconds training waited for it.

        With `async_mode = "async"` it returns once the tensors are copied to host memory; a thread writes
        them, and an error it meets is raised by the next `save` or `wait`.

        Args:
            tensors: the run's tensors that this rank holds, by name; FSDP's shards as DTensors.
            state: JSON of the first rank's; `identity` in it is compared when a run goes on from here.

        Raises:
            CheckpointError: it cannot be written (a full disk, ...); older checkpoints are as they were.
            PeerLost: a rank is gone.
        """
        start = time.perf_counter()
        text = json.dumps(state, indent=2) + "\n"
        self.wait()
        if self.section.async_mode == "async":
            copies = self._copies.take(tensors)
            blocked = time.perf_counter() - start
            self._writing = self._thread.submit(self._write, step, tensors, text, start, copies, blocked)
            return blocked
        self._write(step, tensors, text, start)
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait until the last `save` is on disk, and raise what went wrong in it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and end the writing thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(
        self,
        step: int,
        tensors: Tensors,
        state: str,
        start: float,
        copies: Tensors | None = None,
        blocked: float | None = None,
    ) -> None:
        needed = total_bytes(tensors, self.group, self.layouts)
        path = on_first(self.group, lambda: self._new_folder(step, needed))
        try:
            write_tensors(path, tensors, self.group, self.layouts, copies)
            files = self._finish(path, state)
            on_first(self.group, lambda: commit.publish(path, step, files))
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(path, ignore_errors=True)  # the error itself matters more
            raise
        seconds = time.perf_counter() - start
        size = sum(record["size"] for record in files.values())
        self.last = Saved(step, size, seconds if blocked is None else blocked, seconds)
        logger.info(
            f"Checkpoint {commit.step_folder(self.folder, step)}: {size / 1e9:.3g} GB in {seconds:.1f} s, "
            f"training waited {self.last.blocked_seconds:.2f} s"
        )
        on_first(self.group, lambda: self._prune(step))

    def _new_folder(self, step: int, needed: int) -> Path:
        ensure_space(self.folder, needed)
        return commit.new_folder(self.folder, step)

    def _finish(self, path: Path, state: str) -> commit.Manifest:
        """Add what only the first rank writes; put all files on the disk, each rank those it wrote."""

        def seal() -> commit.Manifest:
            files = commit.seal(path, f"__{self.rank}_*")
            if self.rank == 0:
                read_metadata(path)  # better to learn now than at the resume that it cannot be read
                write_text(path / STATE, state)
                files |= commit.seal(path, STATE) | commit.seal(path, METADATA)
            return files

        return {name: record for files in together(self.group, seal) for name, record in files.items()}

    def _prune(self, written: int) -> None:
        keep = self.section.keep_latest_k
        for step in commit.whole_steps(self.folder)[:-keep] if keep else []:
            if step != written:  # the newest by time, if not by number: the run may have gone back
                commit.discard(self.folder, step)

    # Reading

    def latest(self) -> int | None:
        """The newest step with a whole checkpoint, as the first rank sees it."""
        self.wait()
        steps = on_first(self.group, lambda: commit.whole_steps(self.folder))
        return steps[-1] if steps else None

    def load(self, tensors: Tensors, step: int, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Fill `tensors` from the checkpoint of `step`; returns the state saved with it.

        Any mesh can read what any other wrote.

        Raises:
            CheckpointError: there is none, it is damaged, or its settings, names, shapes or dtypes are not
            this run's.
        """
        self.wait()
        steps = on_first(self.group, lambda: commit.whole_steps(self.folder))
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"There is no checkpoint of step {step} in {self.folder}; steps there: {there}."
            )
        path = commit.step_folder(self.folder, step)
        verify(path, self.group)
        return load_run(path, tensors, self.group, self.layouts, identity, self.section.force_resume)

    def resume(self, tensors: Tensors, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fill `tensors` from the run's newest whole checkpoint, or that of `load_step`; returns its state.

        A damaged newest one is renamed to `step-N.damaged` and the one before it is taken. None: a fresh run.

        Raises:
            CheckpointError: as `load`; or checkpoints were written, but none is whole any more.
        """
        if self.section.load_step != -1:
            return self._go_back(tensors, identity)
        while (step := self.latest()) is not None:
            try:
                return self.load(tensors, step, identity)
            except DamagedError as error:
                aside = on_first(self.group, lambda: commit.set_aside(self.folder, step))
                logger.error(f"{error} It is now called {aside.name}; trying the checkpoint before it.")
        damaged = on_first(
            self.group, lambda: sorted(path.name for path in self.folder.glob("step-*.damaged*"))
        )
        if damaged:
            raise CheckpointError(
                f"{self.folder} has no whole checkpoint left, only {', '.join(damaged)}. "
                "To start afresh, delete them or choose another job.dump_folder."
            )
        return None

    def _go_back(self, tensors: Tensors, identity: Mapping[str, Any]) -> dict[str, Any]:
        step = self.section.load_step
        state = self.load(tensors, step, identity)
        newest = self.latest()
        if newest is not None and newest > step:
            logger.warning(
                f"Going on from step {step} as checkpoint.load_step says, though there are checkpoints up to "
                f"step {newest}. They stay until overwritten, and without load_step the newest counts."
            )
        return state
