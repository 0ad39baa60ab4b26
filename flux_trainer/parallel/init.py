"""From-scratch weights, filled shard by shard: no rank ever holds a tensor that it does not keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flux_trainer.models.init import Distribution, initial_values


def _local(parameter: Tensor) -> tuple[Tensor, int]:
    """This rank's part, and the flat position of its first element in the whole.

    The part is contiguous in the whole, because only dimension 0 is sharded.
    """
    if not isinstance(parameter, DTensor):
        return parameter, 0
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert tuple(shape[1:]) == tuple(parameter.shape[1:]), "only the first dimension is sharded"
    return parameter.to_local(), offset[0] * parameter.shape[1:].numel()


@torch.no_grad()
def init_weights(model: nn.Module, distributions: Mapping[str, Distribution], seed: int) -> None:
    """Fill every parameter of `model` in place from its distribution, by native name."""
    for name, parameter in model.named_parameters():
        local, start = _local(parameter)
        values = initial_values(
            distributions[name], name, parameter.shape, seed, start, local.numel(), local.device, local.dtype
        )
        local.copy_(values.view(local.shape))
