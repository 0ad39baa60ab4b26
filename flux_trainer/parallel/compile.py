"""torch.compile of blocks and loss. Blocks of one kind share a graph: the cost does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch._dynamo
from torch import Tensor, nn

from flux_trainer.config.schema import Compile


def compile_blocks(blocks: Iterable[nn.Module], section: Compile) -> None:
    """Compile each block's `forward` without graph breaks, in place. FSDP's hooks stay outside."""
    if section.enable and "model" in section.components:
        # Every image size, and training apart from validation, is a graph of its own; torch's 8 would be few.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=section.backend, fullgraph=True)


def compile_loss(loss: Callable[..., Tensor], section: Compile) -> Callable[..., Tensor]:
    """`loss`, compiled if the settings say so."""
    if section.enable and "loss" in section.components:
        return torch.compile(loss, backend=section.backend, fullgraph=True)
    return loss
