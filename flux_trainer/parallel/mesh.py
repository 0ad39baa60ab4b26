"""The mesh: how the world's ranks are divided among the kinds of parallelism.

Rank numbers count through the dimensions pp, dp_replicate, dp_shard, cp, tp, the last one fastest: what
talks most (tp, then cp) lies on neighbouring devices of one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flux_trainer.config.compute import Parallelism
from flux_trainer.parallel.arithmetic import degrees
from flux_trainer.runtime.dist import World

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
DATA = ("dp_replicate", "dp_shard")  # ranks apart along these work on different samples
SHARED = ("pp", "cp", "tp")  # along these, on the same
MODEL = ("pp", "dp_shard", "cp", "tp")  # together these hold the model once


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and the groups it belongs to; a group of one rank is None."""

    sizes: dict[str, int]
    """Ranks along each dimension."""
    coordinates: dict[str, int]
    """This rank's number along each dimension."""
    fsdp: DeviceMesh | None
    """Who shares the weights: dp_shard x cp as `fsdp`; 2-D with `dp_replicate` before it for HSDP."""
    model: DeviceMesh | None
    """1-D: the ranks that hold one whole copy of the weights together, all dimensions but dp_replicate."""
    cp: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    shared: dist.ProcessGroup | None
    """The ranks that work on the same samples: pp x cp x tp."""

    def rank(self, *dimensions: str) -> int:
        """This rank's number in the group along `dimensions`."""
        number = 0
        for name in dimensions:
            number = number * self.sizes[name] + self.coordinates[name]
        return number

    def place(self, stages_per_rank: int = 1) -> str:
        """This rank's place in words: `stage 1 of 2, dp_shard 0`."""
        words = [f"{name} {self.coordinates[name]}" for name in DIMENSIONS if self.sizes[name] > 1]
        if self.sizes["pp"] > 1:
            total = self.sizes["pp"] * stages_per_rank
            stages = range(self.coordinates["pp"], total, self.sizes["pp"])
            words[0] = f"stage {' and '.join(map(str, stages))} of {total}"
        return ", ".join(words)

    def size(self, *dimensions: str) -> int:
        """Number of ranks in a group along `dimensions`."""
        return prod(self.sizes[name] for name in dimensions)


@dataclass(frozen=True)
class DataGroup:
    """The ranks that work on the same samples, as one of the groups that share samples out."""

    number: int
    """Which of the groups it is."""
    count: int
    """Number of groups."""
    leads: bool
    """Whether this rank speaks for its group, where every rank has the same result."""
    world: World


def data_group(mesh: Mesh, world: World) -> DataGroup:
    """This rank's group."""
    return DataGroup(mesh.rank(*DATA), mesh.size(*DATA), mesh.rank(*SHARED) == 0, world)


def build_mesh(section: Parallelism, world_size: int, device_type: str, timeout_seconds: float = 300) -> Mesh:
    """The mesh over all ranks.

    Args:
        timeout_seconds: patience of the groups whose ranks send to each other. gloo's sends and receives keep
            it for ever; `World.set_timeout` changes that of nccl, and of gloo's collectives.

    Raises:
        ValueError: the degrees do not multiply to `world_size`.
    """
    sizes = degrees(section, world_size)
    ranks = torch.arange(world_size).view(*sizes.values())
    place = (ranks == dist.get_rank()).nonzero()[0].tolist()
    group = partial(_group, ranks, timedelta(seconds=timeout_seconds))

    def mesh(**groups: dist.ProcessGroup) -> DeviceMesh:
        shape = [each.size() for each in groups.values()]
        members = ranks[place[0], :, :, :, place[4]].reshape(shape) if len(shape) == 2 else None
        names = tuple(groups)
        given = [*groups.values()] if members is not None else next(iter(groups.values()))
        return DeviceMesh.from_group(given, device_type, mesh=members, mesh_dim_names=names)

    weights, copies, whole = (
        group("dp_shard", "cp"),
        group("dp_replicate"),
        group(*MODEL),
    )
    fsdp = None
    if copies:  # FSDP wants both dimensions, be it that no rank shares a copy with another
        alone = partial(dist.new_group, [dist.get_rank()], use_local_synchronization=True)
        fsdp = mesh(dp_replicate=copies, fsdp=weights or alone())
    elif weights:
        fsdp = mesh(fsdp=weights)
    return Mesh(
        sizes=sizes,
        coordinates=dict(zip(DIMENSIONS, place, strict=True)),
        fsdp=fsdp,
        model=mesh(model=whole) if whole else None,
        cp=group("cp"),
        tp=group("tp"),
        pp=group("pp"),
        shared=group(*SHARED),
    )


def _group(ranks: torch.Tensor, timeout: timedelta, *dimensions: str) -> dist.ProcessGroup | None:
    """This rank's group along `dimensions`, in mesh order; every rank makes all such groups."""
    inner = [DIMENSIONS.index(name) for name in dimensions]
    outer = [i for i in range(ranks.ndim) if i not in inner]
    rows = ranks.permute(*outer, *inner).reshape(-1, prod(ranks.shape[i] for i in inner))
    if rows.shape[1] == 1:
        return None
    if rows.shape[0] == 1 and rows[0].equal(torch.arange(rows.shape[1])):
        return dist.group.WORLD
    mine = None
    for row in rows.tolist():
        group = dist.new_group(row, timeout=timeout, use_local_synchronization=False)
        if dist.get_rank() in row:
            mine = group
    return mine
