"""Where readings and pictures go: `metrics.jsonl` always, TensorBoard and Weights & Biases by choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from flux_trainer.config.schema import Metrics
from flux_trainer.metrics.jsonl import JsonLines
from flux_trainer.metrics.meter import Reading
from flux_trainer.metrics.trackers import TensorBoard, WeightsAndBiases


class Writer(Protocol):
    """One destination."""

    def scalars(self, step: int, values: Reading) -> None:
        """Record numbers by name; None and non-finite values are allowed."""

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        """Record a picture (a grid of images) with the captions of its images."""

    def close(self) -> None:
        """Write what is buffered."""


class Writers:
    """Sends everything to each destination that the settings name; only rank 0 has any."""

    def __init__(
        self,
        section: Metrics,
        dump_folder: Path,
        *,
        rank: int,
        resumed_step: int = 0,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the destinations below `dump_folder`.

        Args:
            rank: of this process; all but 0 write nothing.
            resumed_step: the step of the checkpoint that the run continues; 0: a new run.
            config: the resolved settings, for trackers that show them.

        Raises:
            ValueError: a tracker's package is not installed.
        """
        self._writers: list[Writer] = []
        if rank != 0:
            return
        self._writers.append(JsonLines(dump_folder / "metrics.jsonl", resumed_step))
        if section.enable_tensorboard:
            self._writers.append(TensorBoard(dump_folder / section.save_tb_folder, resumed_step))
        if section.enable_wandb:
            self._writers.append(WeightsAndBiases(dump_folder, resumed_step, config or {}))

    def scalars(self, step: int, values: Reading) -> None:
        """Record numbers by name for a step."""
        for writer in self._writers:
            writer.scalars(step, values)

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        """Record a picture with its captions for a step."""
        for writer in self._writers:
            writer.images(step, tag, picture, captions)

    def close(self) -> None:
        """Write what is buffered; at the end of the run."""
        for writer in self._writers:
            writer.close()
