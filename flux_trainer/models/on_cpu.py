"""What CPUs compute faster than torch does, by other ways to the same values.

In bfloat16:

    linear      y = x W^T + b: oneDNN adds the bias as it writes. torch's addmm first fills y with it, and
                takes 1.05 to 1.1 times as long.
    its dW      torch hands dy^T to the product dy^T x as it lies, in columns. Products whose first operand
                lies in rows take so much less time that it pays to transpose dy before. And of a single row,
                as modulations have, dW is all one multiplication of each of its numbers.
    attention   torch's backward goes tile by tile, which saves memory. Up to `WHOLE` tokens, products of
                whole matrices, a few heads at a time, take less than half as long; their scores are rounded
                to bfloat16 on the way.

In float32:

    linear      of a layer at least as wide as its input: on several threads oneDNN shares the product x W^T
                out better than MKL, which torch takes on x86 (with two, 0.9 of the time).
    gelu        torch's kernel spends its time on tanh. A sigmoid is the same function at two thirds of that,
                if what it reads and writes stays in the cache.
    attention   whole products take 0.87 of the time of torch's backward at 512 tokens, as much at 1024.

All else, and everything elsewhere, is plain torch. Times are of a Xeon with AMX.

How exact: as torch, but for attention in bfloat16. The error of its gradients grows with the largest logit: 2
times that of torch's at 5, 5 times at 40, 8 times (4 % instead of 0.5 %) at 70, 14 times at 150.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

aten = torch.ops.aten

FEW = 32
"""Rows below which neither transposing pays nor oneDNN."""
TILE = 16
"""Rows that a CPU with matrix tiles multiplies at a time."""
WHOLE = {torch.bfloat16: 1024, torch.float32: 512}
"""Keys up to which attention's backward computes with all scores of a head at once."""
HEADS = 4
"""Heads whose scores that backward holds at a time."""
STRIP = 64
"""Rows that are transposed at a time: what is read and written stays in the cache."""
CACHED = 2**17
"""Numbers that a thread's cache holds."""

HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()
HAS_ONEDNN_BF16: bool = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""x86 from AVX512 on, and some ARM; elsewhere oneDNN refuses bfloat16."""

_here = True


@contextmanager
def as_elsewhere() -> Iterator[None]:
    """Within it a CPU goes the way of all other devices: for who computes on fake tensors what those keep."""
    global _here
    before, _here = _here, False
    try:
        yield
    finally:
        _here = before


def _applies(dtype: torch.dtype, *tensors: Tensor) -> bool:
    return _here and all(x.device.type == "cpu" and x.dtype == dtype for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., L, in], weight [out, in], bias [out]."""
    rows = x.shape[:-1].numel()
    if _applies(torch.bfloat16, x, weight):
        another_way = rows == 1 or rows >= FEW
    else:
        another_way = rows >= FEW and _is_for_onednn(x, weight)
    if not another_way:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not HAS_ONEDNN:
        return False
    wide = weight.shape[0] >= weight.shape[1]
    return wide and torch.get_num_threads() > 1 and _applies(torch.float32, x, weight)


@torch.library.custom_op("flux_trainer::linear_by_onednn", mutates_args=())
def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, without a gradient. The compiler knows oneDNN's operator for constant weights only."""
    dense = None if bias is None else bias.contiguous()  # oneDNN reads it as if it were, and does not look
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, dense, "none", [], "")
    return y


@linear_by_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.flux_trainer.linear_by_onednn)
def _(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        can = HAS_ONEDNN_BF16 if x.dtype == torch.bfloat16 else HAS_ONEDNN
        by = linear_by_onednn if can and x.shape[:-1].numel() > 1 else F.linear
        return by(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        shape, grad = grad.shape, grad.flatten(0, -2)  # [L, out]
        dx = _times(grad, weight).view(*shape[:-1], weight.shape[1]) if of_x else None
        dw = None
        if of_weight:
            x = x.flatten(0, -2)  # [L, in]
            if x.dtype == torch.float32:
                dw = grad.t() @ x
            else:
                dw = grad.t() * x if len(x) == 1 else transposed(grad) @ x
        return dx, dw, grad.sum(0) if of_bias else None


def _times(grad: Tensor, weight: Tensor) -> Tensor:
    """dy W. A single row goes as the first of a tile's: the product then takes as long as reading W."""
    if len(grad) != 1:
        return grad @ weight
    return (F.pad(grad, (0, 0, 0, TILE - 1)) @ weight)[:1]


def transposed(x: Tensor) -> Tensor:
    """[L, n] -> [n, L], contiguous."""
    if torch.compiler.is_compiling():
        # The compiler chooses strides, and would choose columns, unless they are asked for.
        return x.t().contiguous().as_strided(x.shape[::-1], (x.shape[0], 1))
    out = x.new_empty(x.shape[::-1])
    for strip, rows in zip(out.split(STRIP, dim=1), x.split(STRIP), strict=True):
        strip.copy_(rows.t())
    return out


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016) of x [..., n]."""
    if not _applies(torch.float32, x) or x.numel() < CACHED:
        return F.gelu(x, approximate="tanh")
    y: Tensor = _Gelu.apply(x)
    return y


class _Gelu(torch.autograd.Function):
    """x (1 + tanh u) / 2 = x sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = x.new_empty(x.shape)
        n, slope = x.shape[-1], 2 * math.sqrt(2 / math.pi)  # of 2 u at 0
        rows = max(1, torch.get_num_threads() * CACHED // n)
        for x_, y in zip(x.reshape(-1, n).split(rows), out.view(-1, n).split(rows), strict=True):
            torch.mul(x_, x_, out=y)
            y.mul_(slope * 0.044715).add_(slope).mul_(x_).sigmoid_().mul_(x_)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return aten.gelu_backward(grad, x, approximate="tanh")


def takes_whole_products(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` is the faster one for queries and keys [B, H, L, D]."""
    return k.shape[2] <= WHOLE.get(q.dtype, 0) and _applies(q.dtype, q, k)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of queries, keys and values [B, H, L, D], whose backward has all scores at once."""
    out: Tensor = _Attention.apply(q, k, v)
    return out


class _Attention(torch.autograd.Function):
    """With S = q k^T / sqrt(D), P = softmax(S) and g the gradient of P v, row by row:

    dv = P^T g,    dP = g v^T,    dS = P (dP - sum(P dP)),    dq = dS k / sqrt(D),    dk = dS^T q / sqrt(D)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # As dense matrices; of others, products make copies, in columns, and slowly.
        grad, q, k, v = (x.contiguous() for x in (grad, *ctx.saved_tensors))
        scale = q.shape[-1] ** -0.5
        if torch.compiler.is_compiling():  # which finds its own buffers
            p = (q @ k.mT * scale).softmax(-1)  # [B, H, L, L]
            ds = aten._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
            return ds @ k * scale, ds.mT @ q * scale, p.mT @ grad
        out = [torch.empty_like(x) for x in (q, k, v)]
        by_heads = zip(*(x.flatten(0, 1).split(HEADS) for x in (*out, grad, q, k, v)), strict=True)
        buffers = q.new_empty(2, HEADS, q.shape[2], k.shape[2])
        for dq, dk, dv, g, q, k, v in by_heads:
            p, ds = buffers[:, : len(q)]  # [n, L, L] each
            torch.softmax(torch.baddbmm(p, q, k.mT, beta=0, alpha=scale, out=p), -1, out=p)
            torch.bmm(p.mT, g, out=dv)
            dp = torch.bmm(g, v.mT, out=ds)
            aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=ds)
            torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
            torch.baddbmm(dk, ds.mT, q, beta=0, alpha=scale, out=dk)
        return out[0], out[1], out[2]
