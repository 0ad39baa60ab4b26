"""Exponential moving average of the parameters, sharded as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flux_trainer.runtime.layout import local


class EMA:
    """averages <- averages + w * (parameters - averages), with w = 1 - 2^(-batch / half_life).

    The half-life is counted in samples, so it keeps its meaning when the batch changes. Early on it is
    limited to `rampup_ratio` times the samples seen (Karras et al. 2024, EDM2's ramp-up), so that the
    random start is soon forgotten. Averages are float32 or wider.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], half_life: float, rampup_ratio: float
    ) -> None:
        self.half_life, self.rampup_ratio = half_life, rampup_ratio
        self.parameters = {name: p for name, p in named if p.requires_grad}
        self.averages = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the parameters as they are."""
        for name, average in self.averages.items():
            average.copy_(self.parameters[name])

    def weight(self, samples_seen: int, batch: int) -> float:
        """Weight of the newest parameters, after `samples_seen` samples of which the last `batch` are new."""
        half_life = self.half_life
        if self.rampup_ratio > 0:
            half_life = min(half_life, self.rampup_ratio * samples_seen)
        return 1 - 2 ** (-batch / half_life)

    @torch.no_grad()
    def update(self, samples_seen: int, batch: int, skip: Tensor) -> None:
        """Move the averages towards the parameters; not at all where `skip` (scalar on the device) is 1."""
        averages = [local(a) for a in self.averages.values()]
        difference = torch._foreach_sub([local(p) for p in self.parameters.values()], averages)
        torch._foreach_mul_(difference, self.weight(samples_seen, batch) * (1 - skip))
        torch._foreach_add_(averages, difference)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within the context the parameters hold the averages. Free gathered copies before."""
        narrow = {  # a swap would round the averages of parameters in a narrower dtype: keep those aside
            name: p.detach().clone()
            for name, p in self.parameters.items()
            if p.dtype != self.averages[name].dtype
        }
        self._swap(narrow, back=False)
        try:
            yield
        finally:
            self._swap(narrow, back=True)

    @torch.no_grad()
    def _swap(self, narrow: dict[str, Tensor], back: bool) -> None:
        for name, parameter in self.parameters.items():
            p, a = local(parameter), local(self.averages[name])
            if name in narrow:
                p.copy_(local(narrow[name]) if back else a)
            else:
                kept = p.clone()
                p.copy_(a)
                a.copy_(kept)

    def tensors(self) -> dict[str, Tensor]:
        """Live averages for a checkpoint, by name `ema.<parameter>`."""
        return {f"ema.{name}": a for name, a in self.averages.items()}
