"""How far ahead FSDP gathers weights."""

import pytest
import torch
from helpers.fake_world import fake_world
from helpers.sent import Sent
from torch import nn

from flux_trainer.config.compute import Parallelism
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.mesh import build_mesh


def gathers_before_blocks(prefetch: int) -> tuple[list[int], list[int]]:
    """All-gathers so far when each of five blocks starts its forward, and its backward."""
    blocks = [nn.Linear(4, 4) for _ in range(5)]
    model = nn.Sequential(*blocks)
    forward, backward = [], []
    with fake_world(2), Sent() as sent:
        shard(model, blocks, build_mesh(Parallelism(), 2, "cpu").fsdp, prefetch=prefetch)
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: forward.append(sent.calls["all-gather"]))
            block.register_full_backward_hook(lambda *_: backward.append(sent.calls["all-gather"]))
        model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    return forward, backward


@pytest.mark.parametrize("prefetch", [2, 3])
def test_weights_of_so_many_blocks_are_gathered_ahead(prefetch):
    forward, backward = gathers_before_blocks(prefetch)
    assert forward == [min(1 + i + prefetch, 5) for i in range(5)]
    assert backward == [5 + min(1 + i + prefetch, 5) for i in range(5)]


def test_by_default_fsdp_gathers_one_block_ahead_in_backward():
    assert gathers_before_blocks(1)[1] == [5 + min(1 + i + 1, 5) for i in range(5)]
