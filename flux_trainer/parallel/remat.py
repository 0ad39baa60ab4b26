"""Activation checkpointing (rematerialisation), block by block.

A block's `forward` is replaced, rather than the block wrapped, so parameter names stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flux_trainer.config.schema import ActivationCheckpoint
from flux_trainer.parallel.context import COLLECTIVES

aten = torch.ops.aten
# The dearest results to compute again: attention's output, on every backend, and whatever has travelled.
DEAR = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.all_reduce.default,  # tensor parallelism's sums
    torch.ops._c10d_functional.all_gather_into_tensor.default,  # and modulations
    *COLLECTIVES,  # context parallelism's exchanges
}
MATMULS = {aten.mm.default, aten.addmm.default}


def _selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Keep what is dear and every second matrix product, recompute all else."""
    count = {False: 0, True: 0}  # forward and recomputation each count for themselves

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in MATMULS:
            count[ctx.is_recompute] += 1
        keep = op in DEAR or (op in MATMULS and count[ctx.is_recompute] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_checkpointing(blocks: Iterable[nn.Module], section: ActivationCheckpoint) -> None:
    """Make the blocks recompute their activations in backward, in place."""
    if section.mode == "none":
        return
    every = 1
    # The model draws no random numbers, so there is no generator state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if section.mode == "selective":
        if section.selective_ac_option == "op":
            options["context_fn"] = _selective_contexts
        else:
            every = int(section.selective_ac_option)

    def recomputed(block: nn.Module, *args: Any) -> Any:
        return checkpoint(partial(type(block).forward, block), *args, **options)

    for index, block in enumerate(blocks):
        if index % every == 0:
            # A method, not a closure over the block: compiled blocks of a kind then share a graph.
            block.forward = MethodType(recomputed, block)
