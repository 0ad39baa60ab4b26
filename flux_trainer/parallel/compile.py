"""torch.compile, block by block: blocks of one kind share one graph, so the cost does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from flux_trainer.config.schema import Compile


def compile_blocks(blocks: Iterable[nn.Module], section: Compile) -> None:
    """Compile each block's `forward` without graph breaks, in place. FSDP's hooks stay outside."""
    if section.enable and "model" in section.components:
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=section.backend, fullgraph=True)
