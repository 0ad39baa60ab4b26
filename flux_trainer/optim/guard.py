"""Clipping, and the guard that cancels a step whose gradient is not finite or jumps out of its usual range.

The decision stays on the device: it is a tensor that the optimizer and the EMA read, never an `if`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SPIKE_MEMORY = 0.98  # weight of the past in the running mean of the gradient norm
SPIKE_WARMUP = 50  # accepted steps before the mean is trusted


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to a total 2-norm of at most `max_norm` (0: leave them); returns the old norm.

    The norm is taken over all shards, so it is the same number on every rank.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Guard:
    """Says of each step whether to skip it, and keeps count. All state lives on the device.

    A step is skipped when its gradient norm is not finite or, with `spike_factor` > 0, exceeds that multiple
    of the running mean over accepted steps.
    """

    def __init__(self, spike_factor: float, device: torch.device) -> None:
        self.spike_factor = spike_factor
        self.mean = torch.zeros((), device=device)  # running mean of the norm
        self.accepted = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_row = torch.zeros((), device=device)
        self.longest_skip = torch.zeros((), device=device)  # the most there were in a row

    def __call__(self, grad_norm: Tensor) -> Tensor:
        """float32 scalar: 1 = skip, 0 = go on."""
        grad_norm = grad_norm.detach().float()
        bad = ~torch.isfinite(grad_norm)
        if self.spike_factor > 0:
            bad |= (self.accepted >= SPIKE_WARMUP) & (grad_norm > self.spike_factor * self.mean)
        good = (~bad).float()
        # Plain mean at first, exponential later; where() because 0 * nan is nan.
        memory = torch.clamp(self.accepted / (self.accepted + 1), max=SPIKE_MEMORY)
        self.mean.copy_(torch.where(bad, self.mean, memory * self.mean + (1 - memory) * grad_norm))
        self.accepted += good
        self.skipped += 1 - good
        self.skipped_in_row.copy_((self.skipped_in_row + 1) * (1 - good))
        self.longest_skip.copy_(torch.maximum(self.longest_skip, self.skipped_in_row))
        return 1 - good

    def tensors(self) -> dict[str, Tensor]:
        """Live state for a checkpoint."""
        names = ("mean", "accepted", "skipped", "skipped_in_row", "longest_skip")
        return {f"guard.{name}": getattr(self, name) for name in names}
