"""The one place where a plain model becomes a parallel one, and the one order in which that happens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from flux_trainer.adapters.quantize import quantize_linears
from flux_trainer.config.compute import ActivationCheckpoint, Attention, Compile, Parallelism, Quantize
from flux_trainer.models.backends import attention_by
from flux_trainer.models.blocks import Attention as Attend
from flux_trainer.models.model import FluxModel
from flux_trainer.parallel.arithmetic import check_heads, check_ring, context_method, cuts, holds_weights
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.context import ContextParallel
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.mesh import Mesh
from flux_trainer.parallel.offload import Offload
from flux_trainer.parallel.remat import apply_checkpointing, apply_memory_budget
from flux_trainer.parallel.tensor import tensor_parallel
from flux_trainer.runtime.layout import Layout

if TYPE_CHECKING:
    from flux_trainer.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class Parallel:
    """What this rank has of a model that a mesh computes together."""

    parts: list[FluxModel]
    """The model; of a pipeline, this rank's stages."""
    layouts: dict[str, Layout]
    """By name, of those parameters of which this rank holds a part for tensor parallelism."""
    context: ContextParallel | None
    """What splits inputs and gathers outputs, if the mesh shares out the tokens."""
    pipeline: Pipeline | None
    """What runs the parts, if the mesh shares out the blocks."""


def parallelize(
    model: FluxModel,
    mesh: Mesh,
    *,
    tokens: tuple[int, int],
    parallelism: Parallelism,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    attention: Attention | None = None,
    quantize: Quantize | None = None,
) -> Parallel:
    """Make `model`, whose parameters lie on the meta device, compute its part of what the mesh computes.

    Args:
        model: its blocks are the units that are recomputed, compiled and gathered on their own.
        tokens: image and text tokens of a sample, by which a pipeline is cut into stages of equal cost.
        param_dtype: dtype of forward and backward.
        reduce_dtype: dtype of gradient sums over ranks.
        attention: what computes it; None: what torch chooses.
        quantize: which linears multiply in 8 bits; None: none.

    Raises:
        ValueError: the model cannot be shared out so.
    """
    if quantize:  # before a pipeline cuts the model: patterns are of all its names
        quantize_linears(model, quantize)
    hold = holds_weights(parallelism)
    check_heads(model.config, mesh.size("tp"))
    pipeline = None
    if mesh.pp:
        from flux_trainer.parallel.pipeline import Pipeline  # brings torch's compiler: half a second

        pipeline = Pipeline(
            model,
            cuts(model.config, tokens, parallelism),
            mesh.pp,
            schedule=parallelism.pipeline_parallel_schedule,
            dtype=param_dtype,
            hold=hold,
        )
    backend = attention.backend if attention else "auto"
    attend = attention_by(backend)
    context = context_parallel(parallelism, mesh, model.config.num_heads, attend)
    if context:
        check_ring(context.method, backend)
    layouts: dict[str, Layout] = {}
    parts = pipeline.parts if pipeline else [model]
    for part in parts:
        blocks = [block for _, block in part.blocks()]
        if mesh.tp:
            layouts |= tensor_parallel(part.blocks(), mesh.tp)
        use_attention(blocks, context.attention if context else attend)
        offload = Offload() if activation_checkpoint.offload else None
        compiled = compile.enable and "model" in compile.components
        apply_checkpointing(part.blocks(), activation_checkpoint, None if compiled else offload)
        compile_blocks(blocks, compile)
        apply_memory_budget(part.blocks(), activation_checkpoint)
        if offload:
            offload.apply(blocks)
        if mesh.fsdp:
            shard(
                part,
                blocks,
                mesh.fsdp,
                param_dtype=param_dtype,
                reduce_dtype=reduce_dtype,
                reshard_after_forward=not hold,
                prefetch=parallelism.fsdp_prefetch,
            )
        elif param_dtype != next(part.parameters()).dtype:
            read_as(part, param_dtype)  # nothing to share: FSDP would only copy
    return Parallel(parts, layouts, context, pipeline)


def context_parallel(section: Parallelism, mesh: Mesh, heads: int, attend: Attend) -> ContextParallel | None:
    """How this rank shares the tokens of a model with that many heads, if the mesh shares them out; `attend`
    is what computes attention where a rank has whole sequences of keys."""
    if mesh.cp is None:
        return None
    heads //= mesh.size("tp")
    return ContextParallel(mesh.cp, context_method(section, heads), heads, attend)


def use_attention(blocks: Iterable[nn.Module], attend: Attend) -> None:
    """Let `blocks` attend so."""
    for block in blocks:
        block.attention = attend  # type: ignore[assignment]
