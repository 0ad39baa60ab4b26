"""AdamW over sharded parameters, and a step that a device-side flag can cancel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flux_trainer.config.schema import Optimizer
from flux_trainer.optim.rounded_adam import RoundedAdam
from flux_trainer.runtime.layout import WHOLE, Layouts, local


class _OnShards:
    """Lets torch's Adam step on this rank's shards as plain tensors, for all that it does is elementwise.

    As DTensors they would cost the host more than the kernels take, and with torch 2.11 each fused step leaks
    a DTensorSpec for every parameter (pytorch #188174). The state still consists of DTensors.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex: bool = super()._init_group(group, *lists)  # type: ignore[misc]
        for tensors in lists:  # parameters, gradients, moments and steps
            tensors[:] = map(local, tensors)
        return has_complex


class Adam(_OnShards, torch.optim.Adam):
    """torch's, on shards."""


class AdamW(_OnShards, torch.optim.AdamW):
    """torch's, on shards."""


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    section: Optimizer,
    *,
    seed: int = 0,
    layouts: Layouts = WHOLE,
) -> torch.optim.Optimizer:
    """Adam or AdamW (Loshchilov & Hutter 2019). Only matrices decay: biases and norm scales are vectors.

    `decay_all` decays those too, as torchtitan v0.2 does. torch's own, unless something is stored in
    bfloat16: then `RoundedAdam`, whose rounding is a function of `seed` and an element's place (`layouts`).
    """
    names = {p: name for name, p in named if p.requires_grad}
    parameters = [*names]
    matrices = [p for p in parameters if p.ndim >= 2 or section.decay_all]
    vectors = [p for p in parameters if not (p.ndim >= 2 or section.decay_all)]
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((matrices, section.weight_decay), (vectors, 0.0))
        if params
    ]
    stored = parameters[0].dtype
    state_dtype = getattr(torch, section.state_dtype) if section.state_dtype else stored
    if torch.bfloat16 in (stored, state_dtype):
        return RoundedAdam(
            groups,
            names,
            lr=section.lr,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            decoupled=section.name == "AdamW",
            state_dtype=state_dtype,
            compiled=section.implementation == "fused" and parameters[0].device.type == "cuda",
            seed=seed,
            layouts=layouts,
        )
    cls = {"AdamW": AdamW, "Adam": Adam}[section.name]
    return cls(
        groups,
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        fused=section.implementation == "fused",
        foreach=section.implementation == "foreach",
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One optimizer step, or none, leaving weights and moments untouched, where `skip` (float32 scalar) is 1.

    The fused kernels read the flag on the device; the other implementations have to ask the host.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip.item():
        optimizer.step()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """Adam's state as a flat dict `optimizer.state.<parameter>.<step|exp_avg|exp_avg_sq>` of live tensors.

    Before the first step there is none: it is made here, as Adam itself would, so that it can be loaded into.
    """
    tensors: dict[str, Tensor] = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        if not state and isinstance(optimizer, RoundedAdam):
            state.update(optimizer.fresh(p))
        elif not state:
            on_device = p.device if optimizer.defaults["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for key, value in state.items():
            tensors[f"optimizer.state.{name}.{key}"] = value
    return tensors
