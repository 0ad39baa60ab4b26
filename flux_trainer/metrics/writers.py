"""Where readings and pictures go: `metrics.jsonl` always, TensorBoard and Weights & Biases by choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from flux_trainer.config.schema import Metrics
from flux_trainer.metrics.jsonl import JsonLines
from flux_trainer.metrics.meter import Reading
from flux_trainer.metrics.trackers import TensorBoard, WeightsAndBiases, one_line
from flux_trainer.runtime.log import logger


class Writer(Protocol):
    """One destination."""

    def scalars(self, step: int, values: Reading) -> None:
        """Record numbers by name; None and non-finite values are allowed."""

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        """Record a picture (a grid of images) with the captions of its images."""

    def close(self) -> None:
        """Write what is buffered."""


class Writers:
    """Sends everything to each destination that the settings name; only rank 0 has any.

    A tracker that fails later in the run is left out with a warning.
    """

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
            ValueError: a tracker's package is not installed, or it refuses the run.
            OSError: a file cannot be written.
        """
        self._figures: JsonLines | None = None
        self._trackers: dict[str, Writer] = {}
        if rank != 0:
            return
        # The tracker that may refuse comes first: nothing has been changed yet.
        if section.enable_wandb:
            self._trackers["Weights & Biases"] = WeightsAndBiases(dump_folder, resumed_step, config or {})
        if section.enable_tensorboard:
            self._trackers["TensorBoard"] = TensorBoard(dump_folder / section.save_tb_folder, resumed_step)
        self._figures = JsonLines(dump_folder / "metrics.jsonl", resumed_step)

    def scalars(self, step: int, values: Reading) -> None:
        """Record numbers by name for a step."""
        if self._figures:
            self._figures.scalars(step, values)
        self._tell(lambda tracker: tracker.scalars(step, values))

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        """Record a picture with its captions for a step."""
        self._tell(lambda tracker: tracker.images(step, tag, picture, captions))

    def close(self) -> None:
        """Write what is buffered; at the end of the run."""
        if self._figures:
            self._figures.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, call: Callable[[Writer], None]) -> None:
        """Make a call to each tracker. One that fails gets no more calls: training is worth more."""
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # of another package: any class
                del self._trackers[name]
                logger.warning(
                    f"{name} has failed and gets no more figures; metrics.jsonl has all of them: "
                    f"{one_line(error)}"
                )
