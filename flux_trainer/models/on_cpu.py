"""Two gradients in bfloat16 that CPUs compute faster than torch has it, by other ways to the same products.

    linear      torch hands dy^T to the product that makes dW = dy^T x as it lies, in columns. Products whose
                first operand lies in rows take so much less time that it pays to transpose dy before. And of
                a single row, as modulations have, dW is all one multiplication of each of its numbers.
    attention   torch's backward goes tile by tile, which saves memory. Up to `WHOLE` tokens, products of
                whole matrices take half the time; their scores are rounded to bfloat16 on the way.

Forward is torch's own. Elsewhere, and for what is small, both are plain torch.

How exact: linears are as exact as torch's. Attention's gradients have about twice the error of torch's while
the largest logit is below some 70; a run whose logits go to 150 has more noise in them by an order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

FEW = 32
"""Rows below which it does not pay to transpose."""
WHOLE = 1024
"""Keys up to which attention's backward holds all scores at once."""
STRIP = 64
"""Rows that are transposed at a time: what is read and written stays in the cache."""

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


def _applies(*tensors: Tensor) -> bool:
    return _here and all(x.device.type == "cpu" and x.dtype == torch.bfloat16 for x in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x [..., L, in], weight [out, in], bias [out]."""
    if not _applies(x, weight) or not torch.is_grad_enabled() or 1 < x.shape[:-1].numel() < FEW:
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = grad @ weight if of_x else None
        grad, dw = grad.flatten(0, -2), None  # [L, out]
        if of_weight:
            x = x.flatten(0, -2)  # [L, in]
            dw = grad.t() * x if len(x) == 1 else transposed(grad) @ x
        return dx, dw, grad.sum(0) if of_bias else None


def transposed(x: Tensor) -> Tensor:
    """[L, n] -> [n, L], contiguous."""
    if torch.compiler.is_compiling():
        return x.t().contiguous()
    out = x.new_empty(x.shape[::-1])
    for strip, rows in zip(out.split(STRIP, dim=1), x.split(STRIP), strict=True):
        strip.copy_(rows.t())
    return out


def takes_whole_products(q: Tensor, k: Tensor) -> bool:
    """Whether `attention` is the faster one for queries and keys [B, H, L, D]."""
    return _applies(q, k) and k.shape[2] <= WHOLE


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
        q = q * q.shape[-1] ** -0.5
        p = (q @ k.mT).softmax(-1)  # [B, H, L, L]
        dv = p.mT @ grad
        ds = aten._softmax_backward_data(grad @ v.mT, p, -1, p.dtype)
        dq = (ds @ k).mul_(q.shape[-1] ** -0.5)
        return dq, ds.mT @ q, dv
