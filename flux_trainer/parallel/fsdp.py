"""FSDP2 and HSDP, block by block.

The loss carries its constant denominator itself (1 / global batch), so gradients are *summed* over ranks:
divide factor 1, and a plain SUM, which gloo has too. Inputs are not cast: position ids, timesteps and
guidance stay float32, and the model casts its tokens where it takes them in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

# The output is a view of its linear's, harmless because nobody writes into it.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    prefetch: int = 1,
) -> None:
    """Shard `blocks` one by one, then what is left of `model`, over `mesh`, in place.

    Args:
        param_dtype: dtype of the gathered weights, hence of the computation; None: as stored.
        reduce_dtype: dtype in which gradients are summed; None: as computed.
        reshard_after_forward: free a block's gathered weights between its forward and its backward.
        prefetch: blocks whose weights are gathered ahead of the one that computes.
    """
    blocks = list(blocks)
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    # The root's own weights (input and final layers) are small and are needed at both ends of a step.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    if prefetch > 1:  # one is what FSDP does by itself
        for i, block in enumerate(blocks):
            before, after = blocks[max(0, i - prefetch) : i], blocks[i + 1 : i + 1 + prefetch]
            block.set_modules_to_forward_prefetch(after)  # type: ignore[operator]
            block.set_modules_to_backward_prefetch(before[::-1])  # type: ignore[operator]
    if blocks:
        # By itself FSDP gathers during a block's backward what ran before it in forward. Before the first
        # block of a pipeline's stage that was its last, for another micro-batch; the root is there anyway.
        blocks[0].set_modules_to_backward_prefetch([model])  # type: ignore[operator]


def reshard(model: nn.Module) -> None:
    """Free gathered weights (the root keeps its own after a forward without backward)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def defer_all_reduce(model: nn.Module, is_last: bool) -> None:
    """HSDP with accumulation: reduce-scatter each micro-batch, all-reduce over replicas with the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)
