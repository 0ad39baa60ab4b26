"""Profiler traces and CUDA memory snapshots of a few steps out of many.

Of every `profile_freq` steps the last `profiler_active` are traced, after `profiler_warmup` steps in which
the profiler only runs itself warm. Each rank writes `<dump>/<folder>/step-N/rankR_trace.json.gz` (for
Perfetto) and, on CUDA, `rankR_memory.pickle` (pytorch.org/memory_viz). Off, this costs nothing.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch

from flux_trainer.config.schema import Profiling

MAX_MEMORY_EVENTS = 100_000


class Profiler:
    """A context around the training loop; `step()` is called at the end of each step."""

    def __init__(
        self, section: Profiling, dump_folder: Path, *, rank: int, device: torch.device, step: int = 0
    ) -> None:
        """`step`: steps done before this process started (resumed runs).

        Raises:
            ValueError: warm-up and traced steps do not fit between two traces.
        """
        self.section = section
        self.traces = dump_folder / section.save_traces_folder
        self.snapshots = dump_folder / section.save_memory_snapshot_folder
        self.rank = rank
        self.device = device
        self.done = step
        self._profiler = self._build() if section.enable_profiling else None
        self._record_memory = section.enable_memory_snapshot and device.type == "cuda"

    def _build(self) -> torch.profiler.profile:
        section = self.section
        wait = section.profile_freq - section.profiler_warmup - section.profiler_active
        if wait < 0:
            raise ValueError(
                f"profiling.profile_freq is {section.profile_freq}, but profiler_warmup + profiler_active is "
                f"{section.profiler_warmup + section.profiler_active}: the traces overlap. Raise the former."
            )
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=wait, warmup=section.profiler_warmup, active=section.profiler_active
            ),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )

    def __enter__(self) -> Profiler:
        if self._profiler is not None:
            self._profiler.__enter__()
        if self._record_memory:
            torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        return self

    def step(self) -> None:
        """One training step is done."""
        self.done += 1
        if self._profiler is not None:
            self._profiler.step()
        if self._record_memory and self.done % self.section.profile_freq == 0:
            self._write_snapshot(f"step-{self.done}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, traceback)
        if self._record_memory:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                self._write_snapshot(f"step-{self.done}-out-of-memory")
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        folder = self.traces / f"step-{self.done}"
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"rank{self.rank}_trace.json.gz"))

    def _write_snapshot(self, name: str) -> None:
        folder = self.snapshots / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / f"rank{self.rank}_memory.pickle"))
