"""Ring attention: keys and values go round the ranks, and the next block travels while one computes.

Each rank keeps its queries. In step i it attends to the block of the rank i places before it and merges
what comes out (`partial_attention` has the equations). Backward is another ring: keys and values go round
again, and the sums dk and dv of each block travel along, collecting every rank's share until they are home.
A rank's share for its own block never travels. (Liu et al., "Ring Attention with Blockwise Transformers for
Near-Infinite Context", 2023.)

Sums over blocks are taken, and travel, in float32 or wider. Lengths may differ between ranks, and be zero.

The two rings are operators of their own: a compiled graph holds them as one node each, and selective
checkpointing can keep their results. The group goes by name, as in torch's functional collectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flux_trainer.parallel.group import group_named
from flux_trainer.parallel.partial_attention import (
    merge,
    partial_attention,
    partial_attention_backward,
    wide,
)

KEYS_VALUES, GRADIENTS = 0, 2  # the first of two tags for each of the two things that are on their way


class Hop:
    """A pair of tensors on its way to the next rank, while another comes from the previous one."""

    def __init__(self, pair: Sequence[Tensor], incoming_length: int, group: ProcessGroup, tag: int) -> None:
        """pair: contiguous [B, L, H, D]; a pair with `incoming_length` tokens comes in (none: no message)."""
        rank, size = group.rank(), group.size()
        shape = (pair[0].shape[0], incoming_length, *pair[0].shape[2:])
        self.incoming = [x.new_empty(shape) for x in pair]
        self.outgoing = pair  # alive until it is sent
        messages = [
            dist.P2POp(act, x, group=group, group_peer=peer % size, tag=tag + i)
            for act, tensors, peer in (
                (dist.isend, self.outgoing, rank + 1),
                (dist.irecv, self.incoming, rank - 1),
            )
            for i, x in enumerate(tensors)
            if x.numel()
        ]
        self.works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> list[Tensor]:
        """What has come in; on a GPU the stream waits, not the host."""
        for work in self.works:
            work.wait()
        return self.incoming


@torch.library.custom_op("flux_trainer::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries to all ranks' keys.

    Args:
        q, k, v: this rank's [B, L_r, H, D].
        lengths: the tokens L_r of every rank.
        group_name: of the ranks that share the sequence.

    Returns:
        o [B, L_r, H, D] in q's dtype, and its log-sum-exp [B, H, L_r] in float32 or wider. (Gradients flow
        through o alone.)

    Each rank sends 2 (L - L_{r+1}) B H D elements in 2 (W - 1) messages, with L the sum of the lengths: all
    blocks pass through it but the one that ends with it, that of the next rank.
    """
    group = group_named(group_name)
    rank, size = group.rank(), group.size()
    block = [k.contiguous(), v.contiguous()]
    for step in range(size):
        last = step == size - 1
        hop = None if last else Hop(block, lengths[rank - step - 1], group, KEYS_VALUES)
        keys, values = block
        part, part_lse = partial_attention(q, keys, values)
        if step == 0:
            out, lse = part.to(wide(q.dtype)), part_lse
        else:
            lse = merge(out, lse, part, part_lse)
        if hop is not None:
            block = hop.wait()
    return out.to(q.dtype).contiguous(), lse.contiguous()


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=wide(q.dtype))


@torch.library.custom_op("flux_trainer::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, L_r, H, D] of this rank, given the gradient of `ring_attention`'s o and its results.

    Each rank sends 2 (L - L_{r+1}) B H D elements of keys and values in their dtype, and 2 (L - L_r) B H D
    of their gradients in float32 or wider; each in 2 (W - 1) messages.
    """
    group = group_named(group_name)
    rank, size = group.rank(), group.size()
    block = [k.contiguous(), v.contiguous()]
    sums: Hop | None = None  # dk, dv of the block to come, summed over the ranks it has passed
    for step in range(size):
        last = step == size - 1
        hop = None if last else Hop(block, lengths[rank - step - 1], group, KEYS_VALUES)
        keys, values = block
        dq_part, *shares = partial_attention_backward(grad, q, keys, values, out, lse)
        if step == 0:
            dq, own = dq_part.to(wide(q.dtype)), shares
        else:
            dq.add_(dq_part)
            if sums is None:
                collected = [share.to(wide(q.dtype)).contiguous() for share in shares]
            else:
                collected = [x.add_(share) for x, share in zip(sums.wait(), shares, strict=True)]
            sums = Hop(collected, lengths[rank - step - 1], group, GRADIENTS)
        if hop is not None:
            block = hop.wait()
    if sums is not None:  # several ranks: the own block's gradients come home
        own = [x.add_(share) for x, share in zip(sums.wait(), own, strict=True)]
    dq, dk, dv = (x.to(q.dtype).contiguous() for x in (dq, *own))
    return dq, dk, dv


@ring_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.group_name = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv = ring_attention_backward(grad, *ctx.saved_tensors, ctx.lengths, ctx.group_name)
    return dq, dk, dv, None, None


ring_attention.register_autograd(_backward, setup_context=_save)
