"""The one place where a plain model becomes a parallel one, and the one order in which that happens."""

from __future__ import annotations

import torch

from flux_trainer.config.schema import ActivationCheckpoint, Compile, Parallelism
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.context import ContextParallel, Method
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.mesh import Mesh
from flux_trainer.parallel.remat import apply_checkpointing
from flux_trainer.parallel.tensor import check_tensor_parallel, tensor_parallel
from flux_trainer.runtime.layout import Layout


def parallelize(
    model: Flux1Model,
    mesh: Mesh,
    *,
    parallelism: Parallelism,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> tuple[ContextParallel | None, dict[str, Layout]]:
    """Make `model` compute its part of what the mesh computes together, in place.

    Parameters may be on the meta device.

    Args:
        model: its blocks are the units that are recomputed, compiled and gathered on their own.
        param_dtype: dtype of forward and backward.
        reduce_dtype: dtype of gradient sums over ranks.

    Returns:
        What splits the inputs and gathers the outputs of the model, if the mesh shares out the tokens, and
        the layouts by name of those parameters of which this rank holds a part for tensor parallelism.

    Raises:
        ValueError: the model cannot be shared out so.
    """
    context, heads = None, model.config.num_heads
    check_tensor_parallel(heads, model.config.mlp_hidden, mesh.size("tp"))
    layouts = tensor_parallel(model.blocks(), mesh.tp) if mesh.tp else {}
    heads //= mesh.size("tp")
    blocks = [block for _, block in model.blocks()]
    if mesh.cp:
        context = ContextParallel(mesh.cp, _method(parallelism, heads), heads)
        for block in blocks:
            block.attention = context.attention  # type: ignore[assignment]
    apply_checkpointing(blocks, activation_checkpoint)
    compile_blocks(blocks, compile)
    if mesh.fsdp.size() > 1:
        shard(
            model,
            blocks,
            mesh.fsdp,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            reshard_after_forward=parallelism.fsdp_reshard_after_forward != "never",
        )
    elif param_dtype != next(model.parameters()).dtype:
        read_as(model, param_dtype)  # nothing to share: FSDP would only copy
    return context, layouts


def _method(section: Parallelism, heads: int) -> Method:
    if section.context_parallel_method != "auto":
        return section.context_parallel_method
    return "ring" if heads % section.context_parallel_degree else "ulysses"
