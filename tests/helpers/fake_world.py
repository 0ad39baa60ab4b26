"""A process that takes itself for one rank of many: collectives return at once, nothing travels.

What a rank computes with is then garbage, but what it holds, does and sends is what it would be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist

from flux_trainer.runtime.dist import World


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[None]:
    """Within the context, a `Trainer` that is built belongs to a world of `size` ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    world = World(rank, 0, size, torch.device("cpu"), control=group, checkpoint=group)
    try:
        with patch("flux_trainer.trainer.init_distributed", lambda *_: world):
            yield
    finally:
        dist.destroy_process_group()
