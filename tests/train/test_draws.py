"""Ranks that work on the same samples draw the same numbers; ids and times stay exact inside the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config

MESHES = {
    "cp2": ("context",),
    "tp2": ("tensor",),
    "pp2": ("pipeline",),
    "cp2-tp2": ("context", "tensor"),
    "fsdp2-cp2": ("data_parallel_shard", "context"),
}


def draws(folder, names: tuple[str, ...]) -> dict[str, Any]:
    """What this rank drew for one step, and what its model got in bfloat16 training."""
    flags = [f"--parallelism.{n if 'data' in n else n + '_parallel'}_degree=2" for n in names]
    widths = {"dtype": "float32", "mixed_precision_param": "bfloat16", "mixed_precision_reduce": "float32"}
    flags += [f"--training.{key}={value}" for key, value in widths.items()]
    flags += ["--training.img_size=32", "--training.local_batch_size=2", "--encoder.autoencoder_sample"]
    trainer = TinyTrainer(tiny_config(folder, *flags))
    inputs, tables = [], set()
    for part in trainer.parallel.parts:
        part.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(kwargs), with_kwargs=True)
        for _, block in part.blocks():
            block.register_forward_pre_hook(lambda module, args: tables.add(args[-1].dtype))
    loader = trainer.build_loader(0)
    batch = next(loader)
    micro_batches = trainer.micro_batches(batch)
    trainer.forward_backward(micro_batches)
    loader.close()
    coordinates = trainer.mesh.coordinates
    return {
        "group": tuple(coordinates[name] for name in ("dp_replicate", "dp_shard")),
        "drawn": [vars(b) for b in micro_batches],
        "inputs": [{name: x.dtype for name, x in each.items() if torch.is_tensor(x)} for each in inputs],
        "rotary tables": tables,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp2-cp2", *slow(*(mesh for mesh in MESHES if mesh != "fsdp2-cp2"))])
def test_ranks_that_share_samples_draw_alike(mesh, tmp_path):
    """Noise, time, crop, flip, dropped captions, posterior sample: all enter what is compared, bit by bit."""
    ranks = run_ranks(2 ** len(MESHES[mesh]), draws, tmp_path, MESHES[mesh])
    groups: dict[Any, Any] = {}
    for rank in ranks:
        first = groups.setdefault(rank["group"], rank["drawn"])
        for mine, theirs in zip(rank["drawn"], first, strict=True):
            for name in ("x_t", "t", "txt", "vec", "target"):
                assert torch.equal(mine[name], theirs[name]), name
        for inputs in rank["inputs"]:
            for name in ("img_ids", "txt_ids", "timesteps", "guidance"):
                assert inputs[name] == torch.float32, name
        assert rank["rotary tables"] == {torch.float32}
    drawn = [group[0]["x_t"] for group in groups.values()]
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:]), "groups work on different samples"
