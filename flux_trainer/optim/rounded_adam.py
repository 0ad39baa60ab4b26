"""Adam whose moments, or parameters, are stored in bfloat16 with stochastic rounding.

Everything is computed in float32 from what is stored; only the results are rounded. So bfloat16 moments take
4 bytes per parameter instead of 8, and bfloat16 parameters move although most steps are smaller than the
distance to their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flux_trainer.optim.rounding import keys, mix, round_to_bfloat16, word
from flux_trainer.runtime.layout import WHOLE, Box, Layouts, boxes, local, native_shape

CHUNK = 1 << 16  # elements that the uncompiled step takes at once: its temporaries stay in the cache


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter that is updated at once."""

    box: Box
    place: Tensor
    """int32 [5]: number of the first element, elements from one row to the next, and the parameter's keys."""


class RoundedAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015), or AdamW with `decoupled` decay (Loshchilov and Hutter, 2019).

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    State has the names and, but for the moments' dtype, the kinds of torch's fused Adam; and like it `step`
    reads `found_inf` on the device. Rounding is keyed by the parameters' names: the same on any mesh.
    """

    found_inf: Tensor | None = None
    """1: skip this step."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        names: Mapping[nn.Parameter, str],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        state_dtype: torch.dtype,
        compiled: bool,
        seed: int,
        layouts: Layouts = WHOLE,
    ) -> None:
        """
        Args:
            names: of the parameters, matrices or vectors.
            compiled: fuse the update of a parameter into a kernel.
            layouts: of the parameters that tensor parallelism shares out.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "fused": True})
        self.state_dtype, self.decoupled = state_dtype, decoupled
        self.betas = betas
        self.update = _update_rule(*betas, eps)
        if compiled:
            from torch._dynamo import config as compiler  # half a second: not for who compiles nothing

            # Kinds of parameters: by dtypes, and whether a length is 1.
            compiler.recompile_limit = max(compiler.recompile_limit, 64)
            self.update = torch.compile(self.update, fullgraph=True, dynamic=True)
        self.pieces = {
            p: _pieces(p, name, seed, layouts, None if compiled else CHUNK) for p, name in names.items()
        }

    def fresh(self, p: nn.Parameter) -> dict[str, Tensor]:
        """The state before the first step."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, dtype=self.state_dtype, memory_format=torch.preserve_format),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, or none where `found_inf` is 1, of all parameters that have a gradient."""
        for group in self.param_groups:
            stepping = [p for p in group["params"] if p.grad is not None]
            if not stepping:
                continue
            for p in stepping:
                if not self.state[p]:
                    self.state[p].update(self.fresh(p))
            steps = [self.state[p]["step"] for p in stepping]
            skip = torch.zeros_like(steps[0]) if self.found_inf is None else self.found_inf
            torch._foreach_add_(steps, 1 - skip)
            scalars = self._scalars(torch.stack(steps), group["lr"], group["weight_decay"])
            for p, step, row in zip(stepping, steps, scalars, strict=True):
                state = self.state[p]
                tensors = [local(x) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
                for piece in self.pieces[p]:
                    self.update(*(_rows(piece.box.of(x)) for x in tensors), skip, step, row, piece.place)

    def _scalars(self, steps: Tensor, lr: float, weight_decay: float) -> Tensor:
        """float32 [n, 4] for the steps [n] of n parameters.

        Columns: lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), what decoupled decay leaves of a
        parameter, and by how much it counts in its gradient with the other decay.
        """
        steps = steps.double()
        first, second = (1 - beta**steps for beta in self.betas)
        decoupled, coupled = (1 - lr * weight_decay, 0.0) if self.decoupled else (1.0, weight_decay)
        columns = (
            lr / first,
            second.rsqrt(),
            torch.full_like(first, decoupled),
            torch.full_like(first, coupled),
        )
        return torch.stack(columns, dim=1).float()


def _update_rule(beta1: float, beta2: float, eps: float) -> Callable[..., None]:
    def update(
        p: Tensor, g: Tensor, m: Tensor, v: Tensor, skip: Tensor, step: Tensor, scalars: Tensor, place: Tensor
    ) -> None:
        """One step of p, m and v [R, C] in place. skip, step: scalars; scalars, place: see above."""
        step_size, scale, kept, coupled = scalars.unbind()
        wide = p.float()
        grad = g.float() + coupled * wide
        new_m = beta1 * m.float() + (1 - beta1) * grad
        new_v = beta2 * v.float() + (1 - beta2) * grad * grad
        new_p = kept * wide - step_size * (new_m / (new_v.sqrt() * scale + eps))
        start, stride, by_element, by_step, by_step_again = place.unbind()
        rows, columns = (torch.arange(n, dtype=torch.int32, device=p.device) for n in p.shape)
        element = mix((start + rows * stride)[:, None] + columns ^ by_element)
        step = step.to(torch.int32)
        bits = word(element, step, by_step)
        if m.dtype == torch.bfloat16:
            new_m, new_v = round_to_bfloat16(new_m, bits), round_to_bfloat16(new_v, bits >> 16)
        if p.dtype == torch.bfloat16:
            new_p = round_to_bfloat16(new_p, word(element, step, by_step_again))
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(skip > 0, old, new))

    return update


def _rows(x: Tensor) -> Tensor:
    """A matrix as it is, a vector as a matrix of one row."""
    return x if x.ndim == 2 else x.view(1, -1)


def _pieces(p: nn.Parameter, name: str, seed: int, layouts: Layouts, chunk: int | None) -> list[_Piece]:
    """What this rank holds of `p`, cut into whole rows of about `chunk` elements."""
    layout = layouts.get(name)
    shape = native_shape(p, layout)
    assert p.ndim in (1, 2), f"{name} has {p.ndim} dimensions"
    assert shape.numel() < 1 << 31, f"{name}: the number of an element is an int32"
    stride, own_keys = shape[1:].numel(), keys(seed, name)
    found = []
    for box in boxes(p, layout):
        length = max(1, (chunk or p.numel()) // (box.sizes[1] if p.ndim == 2 else 1))
        for first in range(0, box.sizes[0], length):
            cut = replace(
                box,
                offsets=(box.offsets[0] + first, *box.offsets[1:]),
                sizes=(min(length, box.sizes[0] - first), *box.sizes[1:]),
                local_offsets=(box.local_offsets[0] + first, *box.local_offsets[1:]),
            )
            start = cut.offsets[0] * stride + sum(cut.offsets[1:])
            place = torch.tensor([start, stride, *own_keys], dtype=torch.int32, device=p.device)
            found.append(_Piece(cut, place))
    return found
