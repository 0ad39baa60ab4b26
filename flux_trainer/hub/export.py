"""The files that a finished run leaves for other programs, made from its last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flux_trainer.checkpoint.errors import on_first
from flux_trainer.config.schema import Checkpoint
from flux_trainer.hub.convert import convert
from flux_trainer.hub.detect import Place
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.families import family_of
from flux_trainer.hub.target import Format
from flux_trainer.hub.weights import open_weights
from flux_trainer.runtime.log import logger


def check_export(formats: Sequence[Format], config: Any) -> None:
    """Raise WeightsError if a format cannot hold the model; for the start of a run, not its end."""
    if "diffusers" in formats:
        try:
            family_of(config).diffusers.json(config)
        except ValueError as error:
            raise WeightsError(f'checkpoint.export = ["diffusers"]: {error}') from error


def export(
    section: Checkpoint, step: Path, folder: Path, config: Any, group: dist.ProcessGroup | None = None
) -> None:
    """Write the weights of the checkpoint `step`, just written, into `folder`, as `section` says.

    The first rank of `group` does it, tensor by tensor, and the others wait. A file of BFL's layout is named
    after the flavor, a folder of diffusers' is called `transformer`; what has these names is replaced.

    Raises:
        CheckpointError: on all ranks, when it cannot be written.
    """
    place, family = Place("checkpoint", step), family_of(config)
    names = {"bfl": f"{family.flavor(config) or family.name}.safetensors", "diffusers": family.component}
    dtype = getattr(torch, section.export_dtype)

    def write(to: Format) -> None:
        weights = open_weights(place, family.component, config, ema=section.export_ema, ahead=True)
        convert(weights, folder / names[to], to, dtype, overwrite=True)

    for to in section.export:
        on_first(group, partial(write, to))
        logger.info(f"Exported {folder / names[to]}")
