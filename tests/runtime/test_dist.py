"""Process groups: a world of one without torchrun, figures summed, timeouts moved, a lost peer told."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.ranks import run_ranks, start


def world_of_one(path: str) -> None:
    """FSDP2 trains a layer in a world that no launcher made."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from flux_trainer.runtime.dist import all_gather, init_distributed

    world = init_distributed(30)
    assert (world.rank, world.local_rank, world.size) == (0, 0, 1)
    assert world.sum([1.5, 2.0]) == [1.5, 2.0]
    assert all_gather("a", world.checkpoint) == all_gather("a", None) == ["a"]
    layer = torch.nn.Linear(3, 2, device=world.device)
    fully_shard(layer, mesh=init_device_mesh(world.device.type, (1,)))
    layer(torch.ones(1, 3, device=world.device)).sum().backward()
    world.set_timeout(10)
    world.close()
    with open(path, "w") as file:
        file.write("done")


def test_world_of_one_needs_no_launcher(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    process = start(world_of_one, str(tmp_path / "done"))
    process.join(60)
    assert (tmp_path / "done").read_text() == "done"


def sums() -> tuple[list[float], list[tuple[int, int]]]:
    from flux_trainer.runtime.dist import all_gather, init_distributed

    world = init_distributed(30)
    return world.sum([0.1 * (world.rank + 1), 2.0**60]), all_gather((world.rank, world.size), world.control)


@pytest.mark.distributed
def test_figures_are_summed_in_float64():
    for total, places in run_ranks(2, sums):
        assert total == [0.1 + 0.2, 2.0**61]
        assert places == [(0, 2), (1, 2)]


def patience() -> float:
    """Seconds until rank 0 gives up on rank 1, after the timeout has been lowered from 30 s to 1 s."""
    import torch
    import torch.distributed as dist

    from flux_trainer.runtime.dist import PeerLost, init_distributed

    world = init_distributed(30)
    world.set_timeout(1)
    if world.rank == 1:
        time.sleep(3)
        return 0.0
    began = time.monotonic()
    with pytest.raises(PeerLost, match="noticed while adding up figures"):
        world.sum([1.0])
    waited = time.monotonic() - began
    with pytest.raises(RuntimeError):  # the default group's patience moved as well
        dist.all_reduce(torch.ones(1))
    return waited


@pytest.mark.distributed
def test_set_timeout_shortens_the_wait_for_a_hung_peer():
    assert 0.9 < run_ranks(2, patience, lost={1})[0] < 2.5


def survive() -> float:
    """Seconds until rank 0 notices that rank 1 was killed."""
    from flux_trainer.runtime.dist import PeerLost, all_gather, init_distributed

    world = init_distributed(30)
    world.sum([1.0])
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PeerLost, match="gone or hung"):
        world.sum([1.0])
    with pytest.raises(PeerLost, match="gone or hung"):  # though this group's patience is long
        all_gather(1, world.checkpoint)
    return time.monotonic() - began


@pytest.mark.distributed
def test_a_killed_peer_is_noticed_at_once():
    assert run_ranks(2, survive, lost={1})[0] < 2


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_starts_the_same_world(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from flux_trainer.runtime.dist import init_distributed\n"
        "world = init_distributed(30)\n"
        "assert world.sum([world.rank, world.local_rank]) == [1.0, 1.0] and world.size == 2\n"
        "world.close()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    subprocess.run([*command, "--rdzv-endpoint=localhost:0", str(script)], check=True, timeout=120)


def policy() -> tuple[bool, bool, bool, str, float]:
    import torch

    from flux_trainer.runtime.dist import set_deterministic

    set_deterministic(7, False)
    before = torch.are_deterministic_algorithms_enabled()
    set_deterministic(7, True)
    draw = torch.rand(()).item()
    torch.manual_seed(7)
    assert torch.rand(()).item() == draw
    return (
        before,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ["CUBLAS_WORKSPACE_CONFIG"],
        torch.backends.cudnn.benchmark,
    )


def test_deterministic_policy():
    assert run_ranks(1, policy) == [(False, True, False, ":4096:8", False)]


def close_late() -> float:
    """Seconds that rank 1 waits at the end for rank 0, which is slow beyond the patience of training."""
    from flux_trainer.runtime.dist import init_distributed

    world = init_distributed(30)
    world.set_timeout(1)
    began = time.monotonic()
    if world.rank == 0:
        time.sleep(3)
    world.close()
    return time.monotonic() - began


@pytest.mark.distributed
def test_the_end_waits_for_a_rank_that_hands_over_its_figures():
    assert min(run_ranks(2, close_late)) > 2.5


def patience_by_group() -> tuple[float, ...]:
    """Seconds of the default group, the control group and the checkpoints', as if the device were a GPU."""
    from dataclasses import replace
    from unittest import mock

    import torch

    from flux_trainer.runtime import dist

    world = replace(dist.init_distributed(30), device=torch.device("cuda"))
    groups = {}
    with (
        mock.patch("torch.cuda.synchronize"),
        mock.patch.object(dist, "_set_timeout", lambda time, group: groups.update({group: time})),
    ):
        world.set_timeout(10)
    default = torch.distributed.group.WORLD
    return tuple(
        groups[group].total_seconds() if group in groups else 0.0
        for group in (default, world.control, world.checkpoint)
    )


@pytest.mark.distributed
def test_the_hosts_lose_patience_before_nccl_does():
    assert run_ranks(1, patience_by_group) == [(15, 10, 0)]
