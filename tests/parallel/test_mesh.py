"""Who works with whom on a mesh, against a brute-force listing of coordinates."""

import time
from itertools import product
from math import prod

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from flux_trainer.config.compute import Parallelism
from flux_trainer.parallel.arithmetic import degrees
from flux_trainer.parallel.mesh import DIMENSIONS, Mesh, build_mesh

SIZES = {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 2}


def section(sizes: dict[str, int]) -> Parallelism:
    return Parallelism(
        pipeline_parallel_degree=sizes["pp"],
        data_parallel_replicate_degree=sizes["dp_replicate"],
        data_parallel_shard_degree=sizes["dp_shard"],
        context_parallel_degree=sizes["cp"],
        tensor_parallel_degree=sizes["tp"],
    )


def groups(sizes: dict[str, int]) -> dict:
    """This rank's coordinates, and the members of its groups."""
    mesh = build_mesh(section(sizes), dist.get_world_size(), "cpu")
    members = {name: getattr(mesh, name) for name in ("cp", "tp", "pp", "shared")}
    members |= {
        "fsdp": mesh.fsdp and mesh.fsdp.get_group("fsdp"),
        "model": mesh.model and mesh.model.get_group(),
    }
    found = {k: g and dist.get_process_group_ranks(g) for k, g in members.items()}
    return found | {
        "place": mesh.coordinates,
        "data": (mesh.rank("dp_replicate", "dp_shard"), mesh.size("dp_replicate", "dp_shard")),
        "position": (mesh.rank("pp", "cp", "tp"), mesh.size("pp", "cp", "tp")),
    }


ALONG = {
    "cp": ("cp",),
    "tp": ("tp",),
    "pp": ("pp",),
    "shared": ("pp", "cp", "tp"),
    "fsdp": ("dp_shard", "cp"),
    "model": ("pp", "dp_shard", "cp", "tp"),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pp": 1, "dp_replicate": 2},
        {"pp": 1, "cp": 2},
        {"tp": 1, "cp": 2},
        {"pp": 1, "dp_shard": 1, "cp": 3},
    ],
    ids=str,
)
def test_each_group_is_what_differs_along_its_dimensions_alone(changes):
    sizes = SIZES | changes
    places = [dict(zip(DIMENSIONS, p, strict=True)) for p in product(*(range(n) for n in sizes.values()))]
    for rank, found in enumerate(run_ranks(prod(sizes.values()), groups, sizes)):
        here = places[rank]
        assert found["place"] == here
        for name, along in ALONG.items():
            same = [
                i for i, p in enumerate(places) if all(p[d] == here[d] for d in DIMENSIONS if d not in along)
            ]
            assert (found[name] or [rank]) == same, name
        assert found["data"] == (
            here["dp_replicate"] * sizes["dp_shard"] + here["dp_shard"],
            sizes["dp_replicate"] * sizes["dp_shard"],
        )
        assert len(found["shared"] or [0]) == found["position"][1]
        assert (found["shared"] or [rank])[found["position"][0]] == rank


def test_the_rest_of_the_ranks_shards():
    assert degrees(Parallelism(context_parallel_degree=2, tensor_parallel_degree=3), 24)["dp_shard"] == 4


@pytest.mark.parametrize(
    ("sizes", "world", "arithmetic"),
    [
        (
            {"tp": 3, "dp_shard": 2, "pp": 1},
            8,
            "pp 1 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 3 = 6 ranks, ",
        ),
        ({"tp": 16, "dp_shard": -1, "pp": 1}, 8, "dp_shard 1 x cp 1 x tp 16 = 16 ranks, but the world has 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_arithmetic(sizes, world, arithmetic):
    with pytest.raises(ValueError, match=arithmetic):
        degrees(section(SIZES | sizes), world)


def patience() -> float:
    """Seconds until a receive from the next stage of a pipeline fails."""
    mesh = build_mesh(section(SIZES | {"tp": 1}), dist.get_world_size(), "cpu", timeout_seconds=1)
    began = time.monotonic()
    if mesh.coordinates["pp"] == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            dist.recv(torch.ones(1), group=mesh.pp, group_src=1)
    else:
        time.sleep(2)
    return time.monotonic() - began


@pytest.mark.distributed
def test_neighbours_of_a_pipeline_have_the_patience_they_are_given():
    assert all(0.9 < seconds < 2.5 for seconds in run_ranks(4, patience)[:2])


@pytest.mark.parametrize(
    ("sizes", "place", "stages", "words"),
    [
        ({}, {"pp": 1, "dp_shard": 0, "tp": 1}, 1, "stage 1 of 2, dp_shard 0, tp 1"),
        ({"pp": 2, "tp": 1}, {"pp": 1, "dp_shard": 1}, 2, "stage 1 and 3 of 4, dp_shard 1"),
        ({"pp": 1, "dp_replicate": 3}, {"dp_replicate": 2}, 1, "dp_replicate 2, dp_shard 0, tp 0"),
    ],
)
def test_a_place_in_words(sizes, place, stages, words):
    coordinates = dict.fromkeys(DIMENSIONS, 0) | place
    mesh = Mesh(SIZES | sizes, coordinates, fsdp=None, model=None, cp=None, tp=None, pp=None, shared=None)
    assert mesh.place(stages) == words
