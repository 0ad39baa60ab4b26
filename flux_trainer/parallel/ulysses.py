"""Head-wise all-to-all: each rank trades its tokens of all heads for all tokens of its heads, and back.

In between, attention is the plain one. (Jacobs et al., "DeepSpeed Ulysses", 2023.) Heads and tokens are
shared out as `torch.tensor_split` does, so counts that do not divide are uneven splits of the same message.

The exchange is laid out so that what arrives is used where it lies: tokens outermost, one rank's after the
other's. What leaves is packed in one pass. Both directions are operators (see `ring`), each the other's
transpose, hence its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flux_trainer.models.blocks import Attention
from flux_trainer.parallel.group import group_named, shares


def _equal_runs(heads: list[int]) -> Iterator[tuple[slice, int, int]]:
    """(heads, ranks, heads per rank) of each run of ranks with equally many heads: at most two runs."""
    start = 0
    for each, run in groupby(heads):
        ranks = len(list(run))
        yield slice(start, start + ranks * each), ranks, each
        start += ranks * each


@torch.library.custom_op("flux_trainer::scatter_heads", mutates_args=())
def scatter_heads(tensors: Sequence[Tensor], lengths: Sequence[int], group_name: str) -> Tensor:
    """n tensors [B, L_r, H, D], this rank's tokens -> [L, n, B, H_r, D], this rank's heads.

    lengths: the tokens L_r of every rank; their sum is L.
    Each rank sends n L_r (H - H_r) B D elements in one all-to-all.
    """
    group = group_named(group_name)
    n, (batch, own, all_heads, dim) = len(tensors), tensors[0].shape
    heads = shares(all_heads, group.size())
    element = n * batch * dim  # of one token and one head
    send = tensors[0].new_empty(own * all_heads * element)
    for run, ranks, each in _equal_runs(heads):
        part = send[run.start * own * element : run.stop * own * element]
        part = part.view(ranks, own, n, batch, each, dim)
        for i, x in enumerate(tensors):
            part[:, :, i].copy_(x[:, :, run].unflatten(2, (ranks, each)).permute(2, 1, 0, 3, 4))
    received = send.new_empty(sum(lengths), n, batch, heads[group.rank()], dim)
    dist.all_to_all_single(
        received.view(-1),
        send,
        [length * heads[group.rank()] * element for length in lengths],
        [own * h * element for h in heads],
        group=group,
    )
    return received


@scatter_heads.register_fake
def _(tensors: Sequence[Tensor], lengths: Sequence[int], group_name: str) -> Tensor:
    group = group_named(group_name)
    batch, _, heads, dim = tensors[0].shape
    own_heads = shares(heads, group.size())[group.rank()]
    return tensors[0].new_empty((sum(lengths), len(tensors), batch, own_heads, dim))


@torch.library.custom_op("flux_trainer::gather_heads", mutates_args=())
def gather_heads(x: Tensor, heads: int, lengths: Sequence[int], group_name: str) -> Tensor:
    """The way back: [L, n, B, H_r, D], this rank's heads -> [n, B, L_r, H, D], this rank's tokens.

    heads: all of them, H. Each rank sends n (L - L_r) H_r B D elements in one all-to-all.
    """
    group = group_named(group_name)
    _, n, batch, own_heads, dim = x.shape
    own, element = lengths[group.rank()], n * batch * dim
    all_heads = shares(heads, group.size())
    received = x.new_empty(own * heads * element)
    dist.all_to_all_single(
        received,
        x.contiguous().view(-1),
        [own * h * element for h in all_heads],
        [length * own_heads * element for length in lengths],
        group=group,
    )
    out = x.new_empty(n, batch, own, heads, dim)
    for run, ranks, each in _equal_runs(all_heads):
        part = received[run.start * own * element : run.stop * own * element]
        part = part.view(ranks, own, n, batch, each, dim).permute(2, 3, 1, 0, 4, 5)
        out[:, :, :, run].unflatten(3, (ranks, each)).copy_(part)
    return out


@gather_heads.register_fake
def _(x: Tensor, heads: int, lengths: Sequence[int], group_name: str) -> Tensor:
    rank = group_named(group_name).rank()
    return x.new_empty((x.shape[1], x.shape[2], lengths[rank], heads, x.shape[4]))


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.lengths, ctx.group_name = inputs
    ctx.heads = tensors[0].shape[2]


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None]:
    return list(gather_heads(grad, ctx.heads, ctx.lengths, ctx.group_name).unbind(0)), None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.lengths, ctx.group_name = inputs


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return scatter_heads(list(grad.unbind(0)), ctx.lengths, ctx.group_name), None, None, None


scatter_heads.register_autograd(_scatter_backward, setup_context=_save_scatter)
gather_heads.register_autograd(_gather_backward, setup_context=_save_gather)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group_name: str, attend: Attention
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys: this rank's [B, L_r, H, D] in and out.

    Each rank sends 3 L_r (H - H_r) B D elements in one all-to-all and (L - L_r) H_r B D in another;
    backward L_r (H - H_r) B D and 3 (L - L_r) H_r B D. Where all divides, that is 4 L H B D (W - 1) / W^2
    each way. H must be at least W. What computes it is `attend`.
    """
    mine = scatter_heads([q, k, v], lengths, group_name)  # [L, 3, B, H_r, D]
    q_r, k_r, v_r = (x.transpose(0, 1) for x in mine.unbind(1))
    out = attend(q_r, k_r, v_r, ())  # [B, L, H_r, D]
    return gather_heads(out.transpose(0, 1).unsqueeze(1), q.shape[2], lengths, group_name).squeeze(0)
