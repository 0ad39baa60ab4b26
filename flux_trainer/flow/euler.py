"""Sampling: Euler's method along the learned velocity, from noise (t = 1) to data (t = 0)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def euler(velocity_fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, timesteps: Sequence[float]) -> Tensor:
    """x += (t_next - t) * velocity_fn(x, t) over consecutive `timesteps` (see `timesteps.schedule`).

    x [B, ...] starts as noise; t reaches velocity_fn as [B] in the dtype of x, at least float32, and x keeps
    its dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    for t, t_next in pairwise(timesteps):
        v = velocity_fn(x, torch.full((x.shape[0],), t, dtype=dtype, device=x.device))
        x = (x.to(dtype) + (t_next - t) * v.to(dtype)).to(x.dtype)
    return x
