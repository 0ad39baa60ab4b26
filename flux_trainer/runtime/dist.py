"""The process group: how ranks find each other, the CPU groups beside the main one, and a clean end.

Tensors of the model travel by nccl on CUDA and by gloo on CPU. Decisions of the host (stop flags, figures,
checkpoints) travel on gloo groups of their own, so that they never wait for a device, nor for each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flux_trainer.runtime import peers

T = TypeVar("T")

# Public from torch 2.15 on.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
# Its name from torch 2.13 on, and the one before.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# A rank may write its share of a checkpoint for long while the others wait. A dead peer is noticed at once
# whatever this says (its connection closes); only a hung one is waited for.
_CHECKPOINT_TIMEOUT = timedelta(minutes=30)

# What gloo, nccl and the store say when the other end is gone, or does not come in time.
_PEER_GONE = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting \d+ms for (recv|send)|"
    r"Connection was likely closed|ncclRemoteError"
)


class PeerLost(RuntimeError):
    """A collective failed: another rank is gone or hung. Leave without saving, the state may be torn."""


def tells_of_lost_peer(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that of a peer gone or hung.

    Where it comes from a collective of FSDP, autograd or a pipeline, it is told by its text, for torch has no
    class of its own for it.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PeerLost) or (isinstance(cause, RuntimeError) and _PEER_GONE.search(str(cause))):
            return True
        cause = cause.__cause__
    return False


@dataclass(frozen=True)
class World:
    """This process's place among all of them, and the groups in which the hosts talk."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup
    """gloo; for small messages of the training loop."""
    checkpoint: dist.ProcessGroup
    """gloo; used by the thread that writes checkpoints, beside the training loop."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up each entry over all ranks, in float64 on the host."""
        peers.mark()
        total = torch.tensor(values, dtype=torch.float64)
        with peers_alive("adding up figures"):
            dist.all_reduce(total, group=self.control)
        return total.tolist()

    def set_timeout(self, seconds: float) -> None:
        """Set the patience of all groups but the checkpoint's, once every rank has come here.

        Once for the first step, which compiles and connects and so takes far longer than later ones, and once
        after it. torch has a patience of its own for groups that were made without one.

        nccl's groups get half as much again: what ends their wait kills the process that waits, without a
        word. Where a rank's host stands still, the control group's wait ends before, with an error.
        """
        peers.mark()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with peers_alive("setting the timeout"):
            dist.barrier(group=self.control)
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not self.checkpoint:
                over_nccl = self.device.type == "cuda" and group is not self.control
                _set_timeout(timedelta(seconds=1.5 * seconds if over_nccl else seconds), group)
        peers.be_patient(seconds)

    def close(self) -> None:
        """End the process group together; not after an error, for a peer may be gone.

        Waits as long as for a checkpoint: one rank may still hand the run's figures to a tracker.
        """
        peers.mark()
        with peers_alive("leaving"):
            dist.barrier(group=self.checkpoint)  # without it, a rank that leaves early can abort the others
        peers.leave()
        dist.destroy_process_group()


def init_distributed(timeout_seconds: float = 300, machine_timeout_seconds: int = 6) -> World:
    """Join the ranks that torchrun started, or form a world of one where it did not.

    A default process group that exists already is used as it is.

    Args:
        timeout_seconds: patience of collectives, until `World.set_timeout`.
        machine_timeout_seconds: after which a machine whose watchers do not answer is given up.

    Raises:
        ValueError: more ranks were started on this machine than it has GPUs.
        PeerLost: another rank has not come, or cannot be reached.
    """
    rank, local_rank, size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"This machine has {torch.cuda.device_count()} GPUs, but {local_rank + 1} ranks or more were "
                "started on it. Start one rank per GPU: NGPU, or torchrun's --nproc-per-node."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # the store lies in this process: no port, no environment
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    if size > 1:
        _watch_peers(rank, control, timeout_seconds, machine_timeout_seconds)
    return World(
        rank=rank,
        local_rank=local_rank,
        size=size,
        device=device,
        control=control,
        checkpoint=dist.new_group(backend="gloo", timeout=_CHECKPOINT_TIMEOUT),
    )


def _watch_peers(rank: int, control: dist.ProcessGroup, timeout: float, silence: int) -> None:
    """Start this rank's watcher, together with all others."""
    door = peers.Door()
    try:
        peers.watch(rank, door, all_gather(door.address, control), timeout, silence)
    except OSError as error:
        raise PeerLost(
            f"The watcher of rank {rank} cannot reach its neighbours, or they it, by TCP at ports of the "
            f"kernel's choice ({error}). Open the firewall between the machines, or look whether "
            f"{door.address.host} means {door.address.machine} on all of them."
        ) from error


def all_gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """What each rank of `group` gave, in rank order; values travel by pickle. No group: a world of one."""
    if group is None:
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    with peers_alive("gathering"):
        dist.all_gather_object(values, value, group=group)
    return values


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows x [n, ...] of all ranks of `group`, in rank order: [ranks * n, ...]. No group: x itself.

    Every rank must give as many rows; no gradient flows.
    """
    if group is None:
        return x
    whole = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
    _all_gather_single(whole, x.contiguous(), group=group)
    return whole


def all_gather_ragged(
    nested: list[list[Tensor]], like: Tensor, group: dist.ProcessGroup | None
) -> list[list[Tensor]]:
    """The lists of tensors of all ranks of `group`, in rank order. No group: `nested` itself.

    Tensors may have any shapes, in the dtype and on the device of `like`. The host does not wait for the
    device, for shapes go by gloo. No gradient flows.
    """
    if group is None:
        return nested
    shapes = all_gather([[x.shape for x in tensors] for tensors in nested], group)
    numels = [[shape.numel() for each in theirs for shape in each] for theirs in shapes]
    longest = max(sum(each) for each in numels)
    mine = [x.flatten() for tensors in nested for x in tensors]
    padding = like.new_zeros(longest - sum(len(x) for x in mine))
    gathered = []
    for row, theirs, each in zip(
        all_gather_rows(torch.cat([*mine, padding])[None], group), shapes, numels, strict=True
    ):
        parts = iter(row[: sum(each)].split(each))
        gathered += [[next(parts).view(shape) for shape in sample] for sample in theirs]
    return gathered


@contextmanager
def peers_alive(doing: str) -> Iterator[None]:
    """Turn the failure of a collective inside into PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"Another rank is gone or hung; noticed while {doing}: {error}") from error


def set_deterministic(seed: int, deterministic: bool) -> None:
    """Choose the numerical policy of this process; before the first CUDA kernel.

    The trainer's own numbers are functions of (seed, purpose, draw); torch's generators are seeded as well,
    for whatever else draws from them. float32 products are computed in float32: who wants speed sets a
    narrower dtype.

    Args:
        seed: for torch's generators.
        deterministic: use only kernels that give the same bits each time, and fail where there is none.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # convolutions have a switch of their own
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS picks its split of a sum by free workspace
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False  # the fastest kernel may be another one tomorrow
        # not a pass of NaN over every new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
