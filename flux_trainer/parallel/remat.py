"""Activation checkpointing (rematerialisation), block by block.

A block's `forward` is replaced, rather than the block wrapped, so parameter names stay as they are.

What a block keeps for backward, in elements for each token of width h, with m = 4 h before the MLP's
activation (FLUX.2: 6 h, gate and up):

    policy       double-stream                    single-stream
    full         h                                h
    attention    h + 3 h + h                      h + (3 h + m) + h
    op           image h + h + 5 h, text 2 h + m  FLUX.1 h + h + h, FLUX.2 h + h + (3 h + m)

its input, query, key and value, and attention's output; under "op", in place of query, key and value, every
second of the matrix products as they come: FLUX.1's modulations are products, too. Beside these, a block
keeps attention's log-sum-exp and what there is once for a sample. A single-stream block's first product is
query, key, value and the MLP's inputs in one: keeping a part of it would save memory but no product.
Attention in plain products (`attention.backend` "math", few tokens on a CPU) is computed again under every
policy: its backward asks for the probabilities, which nobody wants to keep.

Under tensor parallelism all but the input is shared out, and the sums of both residual branches (h each; one
in single-stream blocks) are kept on every rank; under context parallelism, what has travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flux_trainer.config.compute import ActivationCheckpoint
from flux_trainer.models import on_cpu  # noqa: F401  (defines an operator named below)
from flux_trainer.parallel.context import COLLECTIVES
from flux_trainer.parallel.offload import Offload

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,  # seen in compiled blocks alone
    torch.ops.flux_trainer.ring_attention.default,
}
# The dearest results to compute again: attention's output, on every backend, and whatever has travelled.
DEAR = {
    *ATTENTION,
    torch.ops._c10d_functional.all_reduce.default,  # tensor parallelism's sums
    torch.ops._c10d_functional.all_gather_into_tensor.default,  # and modulations
    *COLLECTIVES,  # context parallelism's exchanges
}
MATMULS = {
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    torch.ops.flux_trainer.linear_by_onednn.default,
}

Keeps = Callable[[Any], bool]
"""Whether to keep the result of this operator; asked for all operators of a block's forward in turn."""


def every_second_product() -> Keeps:
    """Keep what is dear and every second matrix product."""
    count = 0

    def keeps(op: Any) -> bool:
        nonlocal count
        count += op in MATMULS
        return op in DEAR or (op in MATMULS and count % 2 == 1)

    return keeps


def up_to_attention() -> Keeps:
    """Keep what is dear and the matrix products before attention: modulations, query, key and value."""
    attended = False

    def keeps(op: Any) -> bool:
        nonlocal attended
        attended = attended or op in ATTENTION or op is aten.bmm.default  # attention in plain products
        return op in DEAR or (op in MATMULS and not attended)

    return keeps


SELECTIVE: dict[str, Callable[[], Keeps]] = {"op": every_second_product, "attention": up_to_attention}


def policies(names: Sequence[str], section: ActivationCheckpoint) -> list[str]:
    """For each block of a model's part, by name and in order: none, full, op, attention or memory_budget."""
    found = []
    for index, name in enumerate(names):
        policy = getattr(section, name.split(".")[0]) or section.mode
        if policy == "selective":
            policy = section.selective_ac_option
        if policy.isdecimal():
            policy = "none" if index % int(policy) else "full"
        found.append(policy)
    return found


def apply_checkpointing(
    named_blocks: Iterable[tuple[str, nn.Module]],
    section: ActivationCheckpoint,
    offload: Offload | None = None,
) -> None:
    """Make the blocks recompute their activations in backward, in place.

    Args:
        offload: what takes the kept results of single operators to the host; None where the blocks will be
            compiled: their results are then seen, and taken, from outside.
    """
    blocks = dict(named_blocks)
    recomputed = {policy: _recomputed(policy, offload) for policy in ("full", *SELECTIVE)}
    for (name, block), policy in zip(blocks.items(), policies([*blocks], section), strict=True):
        if policy in recomputed:
            # A method, not a closure over the block: compiled blocks of a kind then share a graph.
            block.forward = MethodType(recomputed[policy][name.split(".")[0]], block)


def _recomputed(policy: str, offload: Offload | None) -> dict[str, Callable[..., Any]]:
    """A block's forward, by its kind, that keeps what the policy says."""
    # The model draws no random numbers, so there is no generator state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy in SELECTIVE:
        contexts = offload.contexts if offload else _contexts
        options["context_fn"] = partial(contexts, SELECTIVE[policy])

    # The compiler takes a length for variable when it meets two in the same piece of code: each kind of block
    # has its own, for a single-stream block's tokens are always more than a double-stream block's.
    def double(block: nn.Module, *args: Any) -> Any:
        return checkpoint(partial(type(block).forward, block), *args, **options)

    def single(block: nn.Module, *args: Any) -> Any:
        return checkpoint(partial(type(block).forward, block), *args, **options)

    return {"double_blocks": double, "single_blocks": single}


Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _contexts(choose: Callable[[], Keeps]) -> Contexts:
    """For forward and recomputation, which ask each for itself."""
    keeps = {False: choose(), True: choose()}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = keeps[ctx.is_recompute](op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_memory_budget(named_blocks: Iterable[tuple[str, nn.Module]], section: ActivationCheckpoint) -> None:
    """Let the compiler keep no more than `section.memory_budget` in blocks of that policy; they are compiled
    already, but not yet run."""
    blocks = dict(named_blocks)
    for block, policy in zip(blocks.values(), policies([*blocks], section), strict=True):
        if policy == "memory_budget":
            block.forward = partial(_within, section.memory_budget, block.forward)


def _within(budget: float, forward: Callable[..., Any], *args: Any) -> Any:
    # The setting counts while a graph is made, and that is in some call; it is nobody else's.
    # Operators of our own (linears on a CPU, context parallelism's exchanges) are as dear as the compiler's.
    with functorch_config.patch(activation_memory_budget=budget, is_non_builtin_to_include=True):
        return forward(*args)
