"""Joint attention.

`attention` is the one seam that context parallelism swaps: each block holds it as `self.attention`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_trainer.models import on_cpu

# Up to this many tokens the CPU's flash kernel is slower than plain matrix products (its backward 4 times).
SHORT = 128


Lengths = tuple[tuple[int, ...], ...]
"""For each sample: how many tokens count on each of the ranks that share them. There is one such rank, unless
context parallelism shares tokens out. What lies behind those that count is padding."""

Shapes = tuple[Tensor, ...]
"""`Lengths` as empty tensors, one for each sample, of shape [0, *its lengths]: the compiler compiles anew for
other numbers, and not for other shapes. Without any, all tokens count."""


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Shapes = ()) -> Tensor:
    """Full (not causal, unmasked) attention; queries, keys, values and result are [B, L, H, D].

    With `lengths`, padding is attended to by none, and its own result is zero.
    """
    if lengths:
        return without_padding(lambda q, k, v, _: attention(q, k, v), q, k, v, lengths)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, D]
    if q.device.type == "cpu" and k.shape[2] <= SHORT:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if on_cpu.takes_whole_products(q, k):
        return on_cpu.attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def without_padding(
    attend: Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Shapes,
    rank: int = 0,
) -> Tensor:
    """`attend` to what counts of each sample: q, k, v and the result [B, L, H, D], padding's result zero.

    Neighbours of one length are attended to together. That does no work for padding and takes any backend of
    attention, of which the fastest have no masks.

    Args:
        attend: of queries, keys, values [b, l, H, D] and their lengths on all ranks.
        rank: this one's number in `lengths`.
    """
    results, start = [], 0
    while start < len(lengths):
        length, end = lengths[start].shape[1:], start + 1
        # A compiled graph must not depend on which lengths are equal.
        while end < len(lengths) and not torch.compiler.is_compiling() and lengths[end].shape[1:] == length:
            end += 1
        own = length[rank]
        result = attend(q[start:end, :own], k[start:end, :own], v[start:end, :own], length)
        results.append(F.pad(result, (0, 0, 0, 0, 0, q.shape[1] - own)))  # [b, L, H, D]
        start = end
    return torch.cat(results)
