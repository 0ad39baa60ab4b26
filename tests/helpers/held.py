"""What a rank holds of a tensor, and the other way round."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from flux_trainer.runtime.layout import Layout


def whole(value: Tensor) -> Tensor:
    """FSDP's shards put together."""
    return value.full_tensor() if isinstance(value, DTensor) else value.detach()


def part(native: Tensor, layout: Layout | None) -> Tensor:
    """What a rank should hold, for tensor parallelism, of a native tensor."""
    if layout is None:
        return native
    return torch.cat([native.narrow(layout.dim, *section) for section in layout.sections], layout.dim)
