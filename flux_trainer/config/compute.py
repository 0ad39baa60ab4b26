"""The settings that say how a model is computed, and not what: on which ranks, with what memory, how fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from flux_trainer.config.section import Degree, PositiveInt, Section


class Parallelism(Section):
    data_parallel_replicate_degree: Degree = 1
    """Groups of ranks that hold whole copies of the sharded model (HSDP)."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy of the model (FSDP2); -1: all that remain."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free a block's gathered weights after its forward; default: always, but never in a pipeline, which
    then also keeps them from micro-batch to micro-batch and reduces gradients once in a step."""
    fsdp_prefetch: PositiveInt = 1
    """Blocks whose weights are gathered ahead of the present one; more hides a slow network, for memory."""
    context_parallel_degree: Degree = 1
    """Ranks that share the tokens of a sample."""
    context_parallel_method: Literal["auto", "ulysses", "ring", "allgather"] = "auto"
    """How attention reaches all tokens: ulysses exchanges tokens for heads, ring passes keys and values on,
    allgather collects them. auto: ulysses where the heads divide evenly, otherwise ring."""
    tensor_parallel_degree: Degree = 1
    """Ranks that share the attention heads and MLP features of a block."""
    pipeline_parallel_degree: Degree = 1
    """Ranks that share the blocks, one stage after another. Local batches are its micro-batches."""
    pipeline_parallel_schedule: Literal["1F1B", "Interleaved1F1B"] = "1F1B"
    """Interleaved1F1B: two stages per rank, with shorter waits and more traffic."""


class ActivationCheckpoint(Section):
    mode: Literal["none", "full", "selective", "attention", "memory_budget"] = "selective"
    """What forward keeps for backward, which computes the rest again. none: keep all; full: keep the blocks'
    inputs; selective: see selective_ac_option; attention: keep what attention returns and the products before
    it (query, key and value; in single-stream blocks, whose first product is fused, the MLP's as well);
    memory_budget: the compiler chooses, see memory_budget."""
    selective_ac_option: str = "op"
    """op: recompute all but attention and every second matrix product; a number n: every n-th block."""
    memory_budget: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of mode memory_budget, which needs compile.enable: the share that is kept of what compiled blocks keep
    by themselves; 0: their inputs."""
    double_blocks: str = ""
    """Another policy for double-stream blocks: none, full, selective, attention, memory_budget, op, or a
    number n for every n-th of all blocks; empty: as mode says."""
    single_blocks: str = ""
    """The same for single-stream blocks."""
    offload: bool = False
    """Move what is kept to the host between forward and backward."""


Backend = Literal["auto", "cudnn", "flash", "efficient", "flex", "math"]


class Attention(Section):
    backend: Backend = "auto"
    """What computes attention. auto: the first of cuDNN (on H100, B200 and their like), flash, efficient and
    math that takes dtype and size of the heads; on CPUs plain products for few tokens, otherwise flash.
    cudnn, flash, efficient: torch's kernels, in whose place comes no other; flex: one that torch.compile
    makes, on CPUs for pictures alone; math: plain products, which keep a number for each pair of tokens."""


class Compile(Section):
    enable: bool = False
    """torch.compile, block by block."""
    components: list[Literal["model", "loss"]] = ["model", "loss"]
    backend: str = "inductor"


EIGHT_BIT_MULTIPLE = {"float8": 16, "float8_rowwise": 16, "mxfp8": 32}
"""Of which number the sides of matrices are multiples where they are multiplied so."""


class Quantize(Section):
    linears: Literal["none", "float8", "float8_rowwise", "mxfp8"] = "none"
    """Multiply in 8 bits in training, through torchao (extra `quant`); weights stay as they are stored.
    float8: one scale per tensor, the fastest; float8_rowwise: one per row; mxfp8: one per 32 numbers."""
    filter: list[str] = ["double_blocks.*", "single_blocks.*"]
    """Linears by patterns of their names, such as single_blocks.*.linear1."""
    skip: list[str] = ["*_mod.lin", "*.modulation.lin"]
    """Those of them that stay as they are; modulations have a row per sample, too few to gain."""
    emulate: bool = False
    """Round as in 8 bits, but multiply as before: shows on any device what that does to a loss; slower."""
