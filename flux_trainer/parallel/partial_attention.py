"""Attention to a part of the keys and values, and how parts become the whole.

Let s_ij = q_i . k_j / sqrt(D). Over one part P of the keys

    lse_P = log sum_{j in P} exp(s_ij),        o_P = sum_{j in P} exp(s_ij - lse_P) v_j.

Over all of them (Liu et al., "Ring Attention with Blockwise Transformers", 2023; the rescaling is that of
Dao et al., "FlashAttention", 2022)

    lse = log sum_P exp(lse_P),                o = sum_P exp(lse_P - lse) o_P.

Backward needs no part's own result: given the *whole* o and lse, p_ij = exp(s_ij - lse_i) are the final
probabilities, and each part gives its share of the sums (FlashAttention-2, Dao 2023, algorithm 2)

    dv_j = sum_i p_ij g_i                      ds_ij = p_ij (g_i . v_j - g_i . o_i)
    dq_i = sum_j ds_ij k_j / sqrt(D)           dk_j = sum_i ds_ij q_i / sqrt(D)

with g the gradient of o. So a flash kernel's backward, handed the whole o and lse, computes a part's share.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from flux_trainer.models.attention import SHORT

aten = torch.ops.aten

Kernel = Literal["flash_for_cpu", "flash", "efficient", "products"]
LSE_ALIGNMENT = 32
"""The efficient kernel wants each head's log-sum-exps to start at a multiple of this."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps and of sums over parts: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def choose_kernel(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The fastest kernel that takes these [B, H, L, D] and returns log-sum-exps."""
    if not (q.numel() and k.numel()):
        return "products"
    if q.is_cuda:
        asked = SDPAParams(q, k, v, None, 0.0, False, False)
        if q.shape[-1] % 8 == 0 and can_use_flash_attention(asked):
            return "flash"
        return "efficient" if can_use_efficient_attention(asked) else "products"
    return "flash_for_cpu" if q.device.type == "cpu" and k.shape[2] > SHORT else "products"


def partial_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(o_P, lse_P) over the given keys: [B, L_q, H, D] in q's dtype, and [B, H, L_q] in float32 or wider.

    q is [B, L_q, H, D]; k and v are [B, L_k, H, D]. Without keys o_P is 0 and lse_P is -inf.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, D]
    match choose_kernel(q, k, v):
        case "flash_for_cpu":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        case "flash":
            out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
        case "efficient":
            out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
            lse = lse[:, :, : q.shape[2]]
        case "products":
            scores = _scores(q, k)
            lse = scores.logsumexp(-1)
            out = ((scores - lse.unsqueeze(-1)).exp() @ v.to(scores.dtype)).to(q.dtype)
    return out.transpose(1, 2), lse


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """Add a part (o_P, lse_P) to what is merged so far: `out` in place, the new log-sum-exp returned.

    out is [B, L, H, D] in float32 or wider, lse [B, H, L]. Of two parts, the second weighs
    exp(lse_2 - log(exp lse_1 + exp lse_2)) = sigmoid(lse_2 - lse_1), and the first weighs the rest.
    """
    weight = (part_lse - lse).sigmoid().transpose(1, 2).unsqueeze(-1)  # [B, L, H, 1]
    out.lerp_(part.to(out.dtype), weight.to(out.dtype))
    return torch.logaddexp(lse, part_lse)


def partial_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The given keys' share of dq, and their dk and dv: each [B, L, H, D], in q's dtype.

    grad, out [B, L_q, H, D] and lse [B, H, L_q] (float32 or wider) are those of the *whole* attention, out
    in q's dtype; the others are as in `partial_attention`. out and lse are contiguous: CUDA's kernels read
    them without looking at strides.
    """
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, D]
    match choose_kernel(q, k, v):
        case "flash_for_cpu":
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, lse, 0.0, False
            )
        case "flash":
            no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)  # its seed is never read
            grads = aten._scaled_dot_product_flash_attention_backward(
                *(grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False),
                *(no_dropout, no_dropout),
            )
        case "efficient":
            # beyond the last query stands +inf, as in forward: exp(s - inf) = 0
            padded = F.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=torch.inf)
            no_dropout = torch.empty((), dtype=torch.int64, device=q.device)
            *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
                *(grad, q, k, v, None, out, padded, no_dropout, no_dropout, 0.0),
                [True, True, True, False],
            )
        case "products":
            grads = _products_backward(grad, q, k, v, out, lse)
    dq, dk, dv = grads
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """s_ij: [B, H, L_q, L_k], in float32 or wider."""
    dtype = wide(q.dtype)
    return (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of this file, word for word; all [B, H, L, D]."""
    dtype, scale = wide(q.dtype), q.shape[-1] ** -0.5
    grad, out = grad.to(dtype), out.to(dtype)
    p = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.to(dtype).mT - (grad * out).sum(-1, keepdim=True))
    dq, dk, dv = ds @ k.to(dtype) * scale, ds.mT @ q.to(dtype) * scale, p.mT @ grad
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
