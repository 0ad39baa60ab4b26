"""What lies between the matrix products, in few passes over memory.

In eager mode each operator is a kernel that reads and writes whole activations, and autograd keeps what goes
in and out of it. So these functions have gradients written by hand: they keep their arguments and little
else, work in place on what is theirs, and need about half as many passes. The compiler fuses the plain
formulas, which stand beside them as `plain_...`; inside compiled code they are what runs.

Shapes: B samples, L tokens, h channels, H heads of D dimensions.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flux_trainer.models import on_cpu


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=eps) + shift


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """(1 + scale) LN(x) + shift for x [B, L, h], shift and scale [B, 1, h] (adaLN, Peebles and Xie, 2023).

    To one sample's tokens that is a layer norm with weight and bias: a single kernel in either direction.
    """
    if torch.compiler.is_compiling():
        return plain_modulated_norm(x, shift, scale, eps)
    if len(x) == 1:
        return _ModulatedNorm.apply(x, shift, scale, eps)
    samples = zip(x.split(1), shift.split(1), scale.split(1), strict=True)
    return torch.cat([_ModulatedNorm.apply(*sample, eps) for sample in samples])


class _ModulatedNorm(torch.autograd.Function):
    """Of one sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        weight = (1 + scale).flatten()
        out, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, shift.flatten(), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        # The CPU's kernel sums the gradients of weight and bias in their dtype: too coarse in bf16.
        sums = not x.is_cpu or x.dtype.itemsize >= 4
        dx, dscale, dshift = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, rstd, weight, weight, [True, sums, sums]
        )
        if not sums:
            normed = F.layer_norm(x, weight.shape, eps=ctx.eps)
            dscale, dshift = normed.mul_(grad).sum((0, 1)), grad.sum((0, 1))
        return dx, dshift.view(1, 1, -1), dscale.view(1, 1, -1), None


def plain_gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + gate * y


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y for x and y [B, L, h], gate [B, 1, h]."""
    return (plain_gated_sum if torch.compiler.is_compiling() else _GatedSum.apply)(x, gate, y)


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        return grad, (grad * y).sum(1, keepdim=True), grad * gate


def plain_norm_rope(x: Tensor, scale: Tensor, table: Tensor, eps: float) -> Tensor:
    return plain_rope(F.rms_norm(x, x.shape[-1:], eps=eps) * scale, table)


def plain_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x_2i, x_2i+1) of x [B, L, H, D] to (cos a - sin b, sin a + cos b).

    Computed in the table's dtype or wider, returned in that of x.
    """
    dtype = torch.promote_types(x.dtype, table.dtype)
    cos, sin = table.to(dtype).unbind(-1)
    a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1).flatten(-2).to(x.dtype)


def norm_rope(x: Tensor, scale: Tensor, table: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [B, L, H, D] with scale [D] (Zhang and Sennrich, 2019), turned by table (`rope_table`).

    Computed in the table's dtype or wider, returned in that of x.
    """
    return (plain_norm_rope if torch.compiler.is_compiling() else _NormRope.apply)(x, scale, table, eps)


class _NormRope(torch.autograd.Function):
    """y = R(s x r) with r = 1 / sqrt(mean(x^2) + eps); R multiplies the pairs a + ib by cos + i sin.

    Backward, with g = R* dy: ds = sum over tokens and heads of r x g; dx = r s g - x r^3 mean(x s g).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, table: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, table.dtype)
        turn = torch.view_as_complex(table.to(wide))
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # [B, L, H, 1]
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = (x.to(wide) * scale.to(wide)).mul_(r).contiguous()  # as it is already, unless x is strange
        _pairs(y).mul_(turn)
        ctx.save_for_backward(x, scale, turn, r)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale, turn, r = ctx.saved_tensors
        narrow, wide, dim = x.dtype, r.dtype, x.shape[-1]
        x, s = x.to(wide), scale.to(wide)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        g = torch.view_as_real(_pairs(grad.to(wide)) * turn.conj()).flatten(-2)
        xg = (x * g).flatten(0, 2)  # [B L H, D]
        ds = torch.mv(xg.t(), r.flatten())
        mean = torch.mv(xg, s).view_as(r).div_(dim)
        dx = g.mul_(s).mul_(r).addcmul_(x, mean.mul_(r.pow(3)), value=-1)
        return dx.to(narrow), ds.to(scale.dtype), None, None


def _pairs(x: Tensor) -> Tensor:
    """[..., D] -> complex [..., D/2]: a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def plain_gelu(x: Tensor) -> Tensor:
    """With (1 + tanh u) / 2 = sigmoid(2 u): compilers make faster code of exp than of tanh."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    u = math.sqrt(2 / math.pi) * wide * (1 + 0.044715 * wide * wide)
    return (wide * torch.sigmoid(2 * u)).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016)."""
    return (plain_gelu if torch.compiler.is_compiling() else on_cpu.gelu)(x)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020), of equal shapes."""
    return (plain_swiglu if torch.compiler.is_compiling() else _SwiGLU.apply)(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its arguments alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
