"""Attention to gathered keys and values: every rank holds all of them, and its own queries.

The simplest method, and the one whose memory grows with the whole sequence. Backward sums the gradients of
keys and values over the ranks, in float32 or wider, and leaves each rank its own tokens' (reduce-scatter).
Collectives want equal shapes: shorter ranks are padded for the way, and the padding is cut off before use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import ProcessGroup

from flux_trainer.models.blocks import Attention
from flux_trainer.parallel.group import group_named
from flux_trainer.parallel.partial_attention import wide

# torch 2.13 renamed both
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_tokens(tensors: Sequence[Tensor], lengths: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """Tensors [B, L_r, ...] of every rank -> [L, B, ...] with all tokens in the order of ranks.

    Each rank sends (W - 1) max(L_r) tokens of each tensor.
    """
    longest = max(lengths)
    pending = []
    for x in tensors:
        own = x.transpose(0, 1)  # [L_r, B, ...]
        if own.shape[0] < longest:
            own = torch.cat((own, own.new_zeros(longest - own.shape[0], *own.shape[1:])))
        everyones = own.new_empty(group.size() * longest, *own.shape[1:])
        pending.append((_all_gather(everyones, own.contiguous(), group=group, async_op=True), everyones))
    gathered = []
    for work, everyones in pending:
        work.wait()
        if min(lengths) < longest:
            parts = zip(everyones.split(longest), lengths, strict=True)
            everyones = torch.cat([part[:length] for part, length in parts])
        gathered.append(everyones)
    return gathered


def reduce_tokens(tensors: Sequence[Tensor], lengths: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """The transpose: [L, B, ...] -> the sums over ranks of this rank's tokens [L_r, B, ...], in float32 or
    wider. Each rank sends (W - 1) max(L_r) tokens of each tensor."""
    longest, own_length = max(lengths), lengths[group.rank()]
    pending = []
    for x in tensors:
        dtype = wide(x.dtype)
        if min(lengths) < longest:
            padded = x.new_zeros(group.size(), longest, *x.shape[1:], dtype=dtype)
            for part, own in zip(padded, x.split(list(lengths)), strict=True):
                part[: own.shape[0]] = own
            everyones = padded.flatten(0, 1)
        else:
            everyones = x.to(dtype).contiguous()
        own = everyones.new_empty(longest, *x.shape[1:])
        pending.append((_reduce_scatter(own, everyones, group=group, async_op=True), own, everyones))
    reduced = []
    for work, own, _ in pending:
        work.wait()
        reduced.append(own[:own_length])
    return reduced


@torch.library.custom_op("flux_trainer::gather_keys_values", mutates_args=())
def gather_keys_values(
    k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str
) -> tuple[Tensor, Tensor]:
    """This rank's k and v [B, L_r, H, D] -> all ranks', [L, B, H, D]; lengths: L_r of every rank."""
    keys, values = gather_tokens((k, v), lengths, group_named(group_name))
    return keys, values


@gather_keys_values.register_fake
def _(k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str) -> tuple[Tensor, Tensor]:
    batch, _, heads, dim = k.shape
    shape = (sum(lengths), batch, heads, dim)
    return k.new_empty(shape), v.new_empty(shape)


@torch.library.custom_op("flux_trainer::reduce_keys_values", mutates_args=())
def reduce_keys_values(
    dk: Tensor, dv: Tensor, lengths: Sequence[int], group_name: str
) -> tuple[Tensor, Tensor]:
    """Gradients [L, B, H, D] of all keys and values on each rank -> their sums for its own [L_r, B, H, D]."""
    sums = reduce_tokens((dk, dv), lengths, group_named(group_name))
    keys, values = (x.to(dk.dtype) for x in sums)
    return keys, values


@reduce_keys_values.register_fake
def _(dk: Tensor, dv: Tensor, lengths: Sequence[int], group_name: str) -> tuple[Tensor, Tensor]:
    own = lengths[group_named(group_name).rank()]
    return dk.new_empty((own, *dk.shape[1:])), dv.new_empty((own, *dv.shape[1:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, ctx.lengths, ctx.group_name = inputs


def _backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    dk, dv = reduce_keys_values(grad_k, grad_v, ctx.lengths, ctx.group_name)
    return dk.transpose(0, 1), dv.transpose(0, 1), None, None


gather_keys_values.register_autograd(_backward, setup_context=_save)


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str, attend: Attention
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys: this rank's [B, L_r, H, D] in and out.

    Each rank sends 2 (W - 1) max(L_r) B H D elements in two all-gathers (as a ring does them); backward as
    many, in float32 or wider, in two reduce-scatters. What computes it is `attend`.
    """
    keys, values = gather_keys_values(k, v, lengths, group_name)
    return attend(q, keys.transpose(0, 1), values.transpose(0, 1), ())
