"""The device mesh: how the world's ranks are divided among the kinds of parallelism.

Dimensions, outermost first: `dp_replicate` (whole copies, present when there are several) and `dp_shard`.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flux_trainer.config.schema import Parallelism


def build_mesh(section: Parallelism, world_size: int, device_type: str) -> DeviceMesh:
    """A named mesh over all ranks: 1-D for FSDP2, 2-D for HSDP.

    Raises:
        ValueError: the degrees do not multiply to `world_size`.
    """
    replicate, shard = section.data_parallel_replicate_degree, section.data_parallel_shard_degree
    if shard == -1:
        shard = world_size // replicate
    if replicate * shard != world_size:
        raise ValueError(
            f"{replicate} (data_parallel_replicate_degree) x {shard} (data_parallel_shard_degree) = "
            f"{replicate * shard} ranks, but the world has {world_size}"
        )
    if replicate == 1:
        return init_device_mesh(device_type, (shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
