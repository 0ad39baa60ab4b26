"""Compiling costs the same at any depth, and is over with the first validation."""

from __future__ import annotations

from itertools import pairwise
from time import process_time
from typing import Any

import pytest
import torch
from helpers.small_model import arguments, small, small2
from torch._dynamo.testing import CompileCounterWithBackend

from flux_trainer.config.compute import ActivationCheckpoint, Compile
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.offload import Offload
from flux_trainer.parallel.remat import apply_checkpointing, apply_memory_budget

CONFIGS = {"flux1": small, "flux2": small2}


class Compiled:
    """A small model whose blocks are compiled, and how many graphs that has taken so far."""

    def __init__(self, family: str, backend: str, depths=(2, 3), **section: Any) -> None:
        torch._dynamo.reset()
        torch.set_num_threads(1)
        config = CONFIGS[family](depth=depths[0], depth_single_blocks=depths[1])
        self.model = model_class(config)(config)
        self.counter = CompileCounterWithBackend(backend)
        settings = ActivationCheckpoint(**section)
        blocks = [block for _, block in self.model.blocks()]
        apply_checkpointing(self.model.blocks(), settings)
        compile_blocks(
            blocks, Compile.model_construct(enable=True, components=["model"], backend=self.counter)
        )
        apply_memory_budget(self.model.blocks(), settings)
        if settings.offload:
            Offload().apply(blocks)

    def __call__(self, batch: int, image: int, training: bool = True) -> int:
        """A forward, and a backward if it is for training; returns the number of graphs."""
        given = arguments(self.model.config, batch, image=image, text=8, dtype=torch.float32)
        with torch.set_grad_enabled(training):
            out = self.model(**given)
            if training:
                out.square().sum().backward()
        return self.counter.frame_count

    def general(self) -> bool:
        """Whether the latest graph is for any length."""
        inputs = self.counter.graphs[-1].graph.find_nodes(op="placeholder")
        return any(isinstance(node.meta.get("example_value"), torch.SymInt) for node in inputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "section"),
    [
        ("flux1", {"mode": "none"}),
        ("flux1", {"mode": "attention", "single_blocks": "2", "offload": True}),
        ("flux2", {"mode": "selective"}),
        ("flux2", {"mode": "memory_budget"}),
    ],
    ids=str,
)
def test_graphs(family, section):
    """Per kind of block one for the first resolution, one for all others, and again without gradients. Where
    some blocks of a kind are recomputed and some are not, these are two kinds."""
    run = Compiled(family, "eager", **section)
    kinds = 3 if section.get("single_blocks") else 2

    assert run(4, 12, training=False) == 2, "validation before the first step"
    assert run(2, 20, training=False) == 4, "pictures"
    assert run(2, 16) == 4 + kinds
    assert not run.general(), "pictures say nothing about training"
    assert run(2, 16) == 4 + kinds
    for size in (12, 20, 40):
        assert run(3, size, training=False) == 4 + kinds, (
            "validation again, with a last batch that is shorter"
        )
    assert run(2, 24) == 4 + 2 * kinds, "a second resolution"
    assert run.general()
    for image in (36, 16, 64, 24):
        assert run(2, image) == 4 + 2 * kinds


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_cost_does_not_grow_with_depth(family):
    """With FLUX.1-dev's depth, tiny in width: as many graphs, whatever a backend makes of each; and processor
    time of the first step less a later one."""

    def cost(depths: tuple[int, int]) -> float:
        run = Compiled(family, "aot_eager", depths, mode="none")
        times = [process_time()]
        for _ in range(3):
            assert run(2, 16) == 2
            times.append(process_time())
        first, _, later = (after - before for before, after in pairwise(times))
        return first - later

    cost((1, 1))  # imports, and what else comes once
    deep, shallow = ([cost(depths) for _ in range(2)] for depths in ((19, 38), (1, 1)))
    assert min(deep) <= 1.3 * min(shallow)
