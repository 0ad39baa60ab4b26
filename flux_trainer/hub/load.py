"""Filling a model's tensors from any layout: each rank reads the rows and columns that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flux_trainer.checkpoint.errors import on_first, together
from flux_trainer.checkpoint.load import load_model
from flux_trainer.hub.detect import locate
from flux_trainer.hub.families import family_of
from flux_trainer.hub.weights import Weights, open_weights
from flux_trainer.runtime.layout import WHOLE, Layouts, boxes, local, native_shape


def load_weights(
    path: str | Path,
    parameters: Mapping[str, Tensor],
    group: dist.ProcessGroup | None = None,
    layouts: Layouts = WHOLE,
    *,
    config: Any,
    ema: bool = False,
) -> str:
    """Fill `parameters` from the weights at `path`, in whatever layout, casting to their dtypes.

    Every rank of `group` calls it with the parameters that it holds: all, or a pipeline stage's; whole, or
    FSDP's and tensor parallelism's parts. No rank reads more than it holds (of DCP's files: than the chunks
    that it lies in). Whatever is wrong with names or shapes is found before anything is filled.

    Args:
        path: see `detect.locate`; all ranks must see it.
        parameters: by native name, with memory.
        layouts: how tensor parallelism shares them out.
        config: of the whole model.
        ema: take the moving average that a checkpoint of this trainer holds.

    Returns:
        What it was, for the log.

    Raises:
        CheckpointError: on all ranks: nothing is there, it is damaged, or it is another model.
    """
    family = family_of(config)
    place = on_first(group, lambda: locate(path, family.component))
    if place.kind == "checkpoint":
        on_first(group, lambda: open_weights(place, family.component, config, ema=ema).describe())
        load_model(place.path, parameters, group, layouts, ema=ema)
        return f"{family.title}{', its average,' * ema} of the checkpoint {place.path}"
    opened: list[Weights] = []  # not a result of `together`, which would send it to the other ranks
    together(group, lambda: opened.append(open_weights(place, family.component, config, ema=ema)))
    together(group, lambda: fill(opened[0], parameters, layouts))
    return f"{opened[0].describe()}: {place.path}"


@torch.no_grad()
def fill(weights: Weights, parameters: Mapping[str, Tensor], layouts: Layouts = WHOLE) -> None:
    """Copy into this rank's parts of `parameters` what they hold of `weights`."""
    for name, parameter in parameters.items():
        layout = layouts.get(name)
        shape = weights.entries[name].shape
        assert shape == tuple(native_shape(parameter, layout)), f"{name}: {shape}"
        for box in boxes(parameter, layout):
            view = torch.atleast_1d(box.of(local(parameter)))
            for row, values in weights.read(name, box.offsets, box.sizes):
                view.narrow(0, row, values.shape[0]).copy_(values)
