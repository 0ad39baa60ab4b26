"""Tensors to and from a folder, through torch's distributed checkpoints (DCP).

Each rank writes its shards into one file; a shard that several ranks hold (HSDP's replicas, plain tensors) is
written by one of them. Reading fits any number of ranks: each rank reads the parts that overlap its shards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from flux_trainer.checkpoint.errors import CheckpointError, together
from flux_trainer.checkpoint.metadata import SafeReader, TensorsOnly, read_metadata
from flux_trainer.runtime.dist import peers_alive

Tensors = Mapping[str, Tensor]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def total_bytes(tensors: Tensors) -> int:
    """Bytes of all tensors as a checkpoint holds them: each element once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class _Planner(DefaultSavePlanner):
    """DCP's plan of writing; with `copies`, it takes the shards from there and not from the tensors."""

    def __init__(self, copies: Tensors | None) -> None:
        super().__init__()
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self.copies is None else self.copies[index.fqn]


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch's zip writer dies of a failed write and covers up why
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


def write_tensors(
    path: Path, tensors: Tensors, group: dist.ProcessGroup | None, copies: Tensors | None = None
) -> None:
    """Write `tensors` into files in the folder `path`, yet to be synced. Every rank of `group` calls it.

    copies: this rank's local parts of the same names in host memory, to be written in their stead.

    Raises:
        CheckpointError: some rank could not write; every rank raises it.
        PeerLost: a rank is gone.
    """
    # thread_count: DCP loses the errors of all threads but the first, and with them the files' content.
    # sync_files: before torch 2.15, DCP syncs a file whose last bytes are still in Python's buffer.
    # per_thread_copy_ahead: copies need no fetching from the device, and so no CUDA stream.
    copy_ahead = 10_000_000 if copies is None else 0
    writer = _Writer(path, sync_files=False, thread_count=1, per_thread_copy_ahead=copy_ahead)
    with _dcp(f"writing {path}", group):
        save(
            dict(tensors),
            storage_writer=writer,
            planner=_Planner(copies),
            process_group=group,
            no_dist=group is None,
        )


def read_tensors(path: Path, tensors: Tensors, group: dist.ProcessGroup | None) -> None:
    """Read the named tensors from folder `path` into the given ones, whose values it replaces.

    Only tensors of the given names are read; others in the folder are left alone. Values are cast to the
    given tensors' dtypes. Every rank of `group` calls it with the same names.

    Raises:
        CheckpointError: a name is missing or has another shape, or the files cannot be read.
        PeerLost: a rank is gone.
    """
    assert not any(tensor.is_meta for tensor in tensors.values()), "give the tensors memory first"
    together(group, lambda: raise_if_any(path, _misfits(path, tensors)))
    with _dcp(f"reading {path}", group):
        load(
            dict(tensors),
            storage_reader=SafeReader(path),
            planner=TensorsOnly(),
            process_group=group,
            no_dist=group is None,
        )


def _misfits(path: Path, tensors: Tensors) -> list[str]:
    problems = []
    saved = read_metadata(path).state_dict_metadata
    for name, tensor in tensors.items():
        entry = saved.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
        elif not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is not a tensor")
        elif entry.size != tensor.shape:
            problems.append(f"{name} has shape {list(entry.size)}, here {list(tensor.shape)}")
        elif sum(math.prod(chunk.sizes) for chunk in entry.chunks) != tensor.numel():
            problems.append(f"{name} is incomplete")  # DCP would leave the rest as it is, without a word
    return problems


def saved_dtypes(path: Path) -> dict[str, torch.dtype]:
    """Name and dtype of every tensor in the checkpoint folder `path`."""
    entries = read_metadata(path).state_dict_metadata
    return {name: e.properties.dtype for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def raise_if_any(path: Path, problems: list[str]) -> None:
    """Raise CheckpointError with the first few of the mismatches between a checkpoint and the model."""
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} does not fit: {'; '.join(problems[:8])}{more}.")


class HostCopies:
    """This rank's parts of a set of tensors in host memory, which is kept from one copy to the next."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, tensors: Tensors) -> dict[str, Tensor]:
        """Copy the local parts of `tensors`; when it returns, the tensors may change."""
        copies = {}
        for name, tensor in tensors.items():
            part = local(tensor)
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                pin = part.is_cuda and part.numel() > 0  # pinned: copied at the bus's full speed
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=pin)
            copies[name] = buffer.copy_(part, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.buffers = copies
        return copies


@contextmanager
def _dcp(doing: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Call DCP inside: without gradients, and with errors that say what happened."""
    with torch.no_grad(), warnings.catch_warnings() if group is None else nullcontext():
        if group is None:  # how a world of one does it, and no cause for DCP's warning
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            with peers_alive(doing):  # errors of a rank's own work come as CheckpointException
                yield
        except CheckpointException as error:  # no Exception, and its text is a traceback per rank
            causes = {rank: cause for rank, (cause, _) in error.failures.items()}
            ranks = "; ".join(f"rank {rank}: {str(cause) or repr(cause)}" for rank, cause in causes.items())
            raise CheckpointError(f"Error while {doing}: {ranks}") from error
