"""From-scratch weights, filled box by box: no rank ever holds a tensor that it does not keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flux_trainer.models.init import Distribution, initial_values
from flux_trainer.runtime.layout import WHOLE, Layouts, boxes, local, native_shape

CHUNK = 1 << 20  # elements computed at once, about


@torch.no_grad()
def init_weights(
    model: nn.Module,
    distributions: Mapping[str, Distribution],
    seed: int,
    layouts: Layouts = WHOLE,
) -> None:
    """Fill every parameter of `model` in place from its distribution, by native name.

    layouts: of the parameters that tensor parallelism shares out.
    """
    for name, parameter in model.named_parameters():
        layout = layouts.get(name)
        shape = native_shape(parameter, layout)
        for box in boxes(parameter, layout):
            _fill(box.of(local(parameter)), box.offsets, distributions[name], name, shape, seed)


def _fill(
    part: Tensor,
    offsets: tuple[int, ...],
    distribution: Distribution,
    name: str,
    shape: torch.Size,
    seed: int,
) -> None:
    """Fill `part`, which lies at `offsets` in the native tensor: some whole rows at a time, cut to size."""
    row = shape[1:].numel()
    step = max(1, CHUNK // row)
    for target, first in zip(part.split(step), range(offsets[0], offsets[0] + len(part), step), strict=True):
        values = initial_values(
            distribution, name, shape, seed, first * row, len(target) * row, part.device, part.dtype
        )
        values = values.view(-1, *shape[1:])
        for dim in range(1, part.ndim):
            values = values.narrow(dim, offsets[dim], part.shape[dim])
        target.copy_(values)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made within have this dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
