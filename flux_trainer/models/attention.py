"""Joint attention, and the table of its rotary position embedding (`fused.norm_rope` turns by it).

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


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Cosine and sine of every position's angles: [B, L, 1, D/2, 2] with D = sum(axes_dim).

    `ids` [B, L, len(axes_dim)] are positions along each axis. Pair i of an axis with d dimensions turns by
    position * theta^(-2i/d) (Su et al., "RoFormer", 2021; one such embedding per axis, side by side).

    float32 or wider whatever the model computes in: bf16 cannot tell positions above 256 apart.
    """
    dtype = torch.promote_types(ids.dtype, torch.float32)
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        angles.append(ids[..., axis, None].to(dtype) * (1.0 / theta**exponent))  # [B, L, d/2]
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).unsqueeze(2)
