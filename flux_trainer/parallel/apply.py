"""The one place where a plain model becomes a parallel one, and the one order in which that happens."""

from __future__ import annotations

import torch
from torch import nn

from flux_trainer.config.schema import ActivationCheckpoint, Compile, Parallelism
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.mesh import Mesh
from flux_trainer.parallel.remat import apply_checkpointing


def parallelize(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: Mesh,
    *,
    parallelism: Parallelism,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Checkpoint, compile and shard `model` in place; parameters may be on the meta device.

    Args:
        blocks: the units that are recomputed, compiled and gathered on their own.
        param_dtype: dtype of forward and backward.
        reduce_dtype: dtype of gradient sums over ranks.
    """
    apply_checkpointing(blocks, activation_checkpoint)
    compile_blocks(blocks, compile)
    if mesh.fsdp.size() == 1:  # nothing to share: FSDP would only copy
        if param_dtype != next(model.parameters()).dtype:
            read_as(model, param_dtype)
        return
    shard(
        model,
        blocks,
        mesh.fsdp,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        reshard_after_forward=parallelism.fsdp_reshard_after_forward != "never",
    )
