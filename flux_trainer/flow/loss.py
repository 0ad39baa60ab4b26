"""The training loss, written so that any split of a batch sums to the same number."""

import torch
from torch import Tensor


def flow_loss(
    pred: Tensor, target: Tensor, weight: Tensor | None, global_batch_size: int, elements: int
) -> Tensor:
    """1 / global_batch_size * sum over samples b of w_b / elements * sum of (pred_b - target_b)^2.

    pred and target [B, ...], weight [B] or None for 1; a scalar in float32 or wider. `elements` is the number
    of a whole sample's, of which pred and target may hold a part. The denominators are constants, so summing
    (never averaging) over micro-batches and ranks gives loss and gradients of the whole batch, and large
    samples count as much as small ones.
    """
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    per_sample = (pred.to(dtype) - target.to(dtype)).square().flatten(1).sum(dim=1) / elements  # [B]
    if weight is not None:
        per_sample = per_sample * weight
    return per_sample.sum() / global_batch_size
