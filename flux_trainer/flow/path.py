"""The straight path between data and noise (rectified flow; Liu et al., 2022; Lipman et al., 2022).

t = 0 is data, t = 1 is noise: x_t = (1 - t) x_0 + t noise, and the velocity d x_t / d t = noise - x_0 is the
model's target. All in float32 or wider.
"""

import torch
from torch import Tensor


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for x0 and noise [B, ...] and t [B], in the widest of their dtypes, at least float32."""
    dtype = torch.promote_types(torch.promote_types(x0.dtype, noise.dtype), torch.float32)
    dtype = torch.promote_types(dtype, t.dtype)
    t = t.to(dtype).view(-1, *[1] * (x0.dim() - 1))  # [B, 1, ...]
    return (1 - t) * x0.to(dtype) + t * noise.to(dtype)


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """noise - x0, at least float32."""
    dtype = torch.promote_types(torch.promote_types(x0.dtype, noise.dtype), torch.float32)
    return noise.to(dtype) - x0.to(dtype)
