"""Clipping, and the guard that cancels a step whose gradient is not finite or jumps out of its usual range.

The decision stays on the device: it is a tensor that the optimizer and the EMA read, never an `if`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flux_trainer.runtime.layout import WHOLE, Layouts, local
from flux_trainer.runtime.log import logger

SPIKE_MEMORY = 0.98  # weight of the past in the running mean of the gradient norm
SPIKE_WARMUP = 50  # accepted steps before the mean is trusted
NONE: Mapping[str, Tensor] = MappingProxyType({})


class SkippedTooOften(ValueError):
    """Step after step was skipped, so nothing is learnt; the message says what to look at."""


def clip_grad_norm(
    parameters: Mapping[str, nn.Parameter],
    max_norm: float,
    *,
    group: dist.ProcessGroup | None = None,
    copies: int = 1,
    layouts: Layouts = WHOLE,
    tp_rank: int = 0,
    freed: Mapping[str, Tensor] = NONE,
) -> Tensor:
    """Scale gradients in place to a total 2-norm of at most `max_norm` (0: leave them); returns the old norm.

    Each element of the model counts once: the norm of what this rank holds, apart from tensors that the first
    rank of its tensor-parallel group counts, then one sum over `group`. The same number on every rank, to the
    last bit, in float32 or wider: replicas that saw different ones might skip different steps.

    Args:
        parameters: those that this rank holds, by native name.
        group: the ranks that hold the model together, so many `copies` of it; None: this rank has all.
        layouts: of the parameters that tensor parallelism shares out; the others are whole on its ranks.
        freed: norms of gradients that are gone already, by the parameters' names.
    """
    alone = group is None or group.size() == 1
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    parts = {name: local(grad) for name, grad in grads.items()}
    assert not alone or all(parts[name].numel() == grads[name].numel() for name in grads), (
        "the others' shards"
    )
    counted = [part for name, part in parts.items() if tp_rank == 0 or name in layouts]
    known = [freed[name] for name in parameters if name in freed and (tp_rank == 0 or name in layouts)]
    first = next(iter(parameters.values()))
    wide = torch.promote_types(first.dtype, torch.float32)
    squares = torch.zeros((), dtype=wide, device=first.device)
    if counted or known:
        norms = [*torch._foreach_norm(counted, 2, wide)] if counted else []
        squares = torch.stack([*norms, *known]).square().sum()
    if not alone:
        dist.all_reduce(squares, group=group)
        squares = squares / copies
    norm = squares.sqrt()
    if max_norm > 0 and parts:
        torch._foreach_mul_([*parts.values()], (max_norm / (norm + 1e-6)).clamp(max=1.0))
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
        self.longest_skip = torch.zeros((), device=device)  # the most in a row since someone set it to 0

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

    def has_learned(self, step: int, *, ends: bool, in_part: Callable[[], bool]) -> bool:
        """Whether any step up to `step` was accepted, so that there is something to save.

        Reading the count waits for the device.

        Args:
            ends: whether the run ends here.
            in_part: whether any parameter has stepped by itself; asked where no step of all was accepted.

        Raises:
            SkippedTooOften: the run ends, and nothing was learned.
        """
        if self.accepted.item() or in_part():
            return True
        what = f"Each step up to step {step} was skipped: its gradients were not finite"
        if ends:
            raise SkippedTooOften(
                f"{what}. The weights are as they were at the start, so there is no checkpoint. Lower "
                "optimizer.lr, or look at the data and at the weights the run started from."
            )
        logger.warning(f"{what}, so no checkpoint is written yet")
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Live state for a checkpoint."""
        names = ("mean", "accepted", "skipped", "skipped_in_row", "longest_skip")
        return {f"guard.{name}": getattr(self, name) for name in names}


def raise_if_skipped_too_often(skips: int, step: int, most: int, *, in_backward: bool) -> None:
    """SkippedTooOften once `most` steps in a row, or more, were skipped.

    Args:
        skips: in a row, up to `step`.
        in_backward: whether each parameter steps by itself, and is skipped by itself.
    """
    if skips >= most:
        where_finite = " where gradients were not finite" if in_backward else ""
        raise SkippedTooOften(
            f"{skips} steps in a row were skipped up to step {step}: their gradients were not finite, or "
            f"jumped (training.spike_factor). The weights are as before them{where_finite}. Lower "
            "optimizer.lr, or look at the data."
        )
