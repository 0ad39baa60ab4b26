"""The optimizer's step inside backward, parameter by parameter: no gradient outlives its making.

Saves the memory of all gradients. What needs all of them together cannot be had: clipping by their common
norm, skipping the whole step for one gradient, adding up micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flux_trainer.optim.build import step
from flux_trainer.runtime.layout import local


class StepInBackward:
    """From now on a parameter's step is done as soon as its gradient, summed over ranks, is there.

    Where the gradient (FSDP: this rank's shard of it) is not finite, weights and moments stay as they are.
    The step's gradient norm then is not finite either, so the guard counts the step as skipped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.optimizer = optimizer
        self.norms: dict[str, Tensor] = {}
        """By parameter: of the gradients of the backward that ran last."""
        names = {p: name for name, p in named}
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._step, names[p], group))

    def has_stepped(self) -> bool:
        """Whether any parameter of this rank has: each is skipped by itself."""
        return any(state["step"].item() for state in self.optimizer.state.values())

    @torch.no_grad()
    def _step(self, name: str, group: dict[str, Any], p: Tensor) -> None:
        assert p.grad is not None
        grad = local(p.grad)
        (norm,) = torch._foreach_norm([grad], 2, torch.promote_types(p.dtype, torch.float32))
        self.norms[name] = norm
        groups, self.optimizer.param_groups = self.optimizer.param_groups, [{**group, "params": [p]}]
        step(self.optimizer, (~norm.isfinite()).float())
        self.optimizer.param_groups = groups
        p.grad = None
