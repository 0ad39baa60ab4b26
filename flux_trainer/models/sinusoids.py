"""The sinusoids of FLUX: what timesteps and guidance are embedded by, and the rotary table of positions.

Both are cos and sin of numbers times the frequencies base^(-2i/dim). exp, pow, cos and sin differ in their
last bit between makes of CPU, vector widths and GPUs, and guidance 3.5 is an angle of 3500 radians: one bit
of a float32 frequency turns it by 2e-4. So the frequencies are computed once, on the host, in float64, and
what follows in float64 too; only the result is rounded. Multiplication is exactly rounded everywhere, and
errors of float64's cos and sin vanish in that rounding, so that all devices get the same float32 numbers.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def _frequencies(dim: int, base: float) -> tuple[float, ...]:
    return tuple(float(base) ** (-2 * i / dim) for i in range(dim // 2))


def frequencies(dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    """base^(-2i/dim) for i < dim/2: float64 [dim/2] on `device`, the same bits on all devices of a host."""
    on_host = torch.tensor(_frequencies(dim, base), dtype=torch.float64, device="cpu")
    return on_host.to(device, non_blocking=True)  # blocking, it would wait for all that the GPU has to do


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoids [B, dim] of 1000 t for t [B]: cosines first, frequencies max_period^(-2i/dim).

    In float32 or wider. bf16 would round 1000 t to steps of 4: t must already arrive in float32. In float32,
    angles are products of float32 numbers, as in BFL's code: at guidance 3.5 rounding them moves the result
    by 1e-4, and BFL's weights have learnt with that.
    """
    t = 1000.0 * t.to(torch.promote_types(t.dtype, torch.float32))
    angle = (t[:, None] * frequencies(dim, max_period, t.device).to(t.dtype)).double()  # [B, dim/2]
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(t.dtype)


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: float) -> Tensor:
    """Cosine and sine of every position's angles: [B, L, 1, D/2, 2] with D = sum(axes_dim).

    `ids` [B, L, len(axes_dim)] are positions along each axis. Pair i of an axis with d dimensions turns by
    position * theta^(-2i/d) (Su et al., "RoFormer", 2021; one such embedding per axis, side by side).

    float32 or wider whatever the model computes in: bf16 cannot tell positions above 256 apart. As diffusers'
    table, it is computed in float64 and rounded once.
    """
    positions = ids.double().unbind(-1)  # [B, L] for each axis
    angles = [
        x[..., None] * frequencies(d, theta, ids.device) for x, d in zip(positions, axes_dim, strict=True)
    ]
    angle = torch.cat(angles, dim=-1)  # [B, L, D/2]
    table = torch.stack((angle.cos(), angle.sin()), dim=-1).unsqueeze(2)
    return table.to(torch.promote_types(ids.dtype, torch.float32))
