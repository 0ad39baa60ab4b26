"""Tensors to and from a folder, through torch's distributed checkpoints (DCP).

Each rank writes its parts into one file; a part that several ranks hold (HSDP's replicas, whole tensors) is
written by one of them. Reading fits any mesh: each rank reads what overlaps its parts. `plan.py` says which
parts these are.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from flux_trainer.checkpoint.errors import CheckpointError, together
from flux_trainer.checkpoint.metadata import SafeReader, is_whole, read_metadata
from flux_trainer.checkpoint.plan import ReadPlan, StreamPlan, Tensors, WritePlan, layout_of, parts_of
from flux_trainer.runtime.dist import all_gather, peers_alive
from flux_trainer.runtime.layout import WHOLE, Layouts, local, native_shape

FRAME = 4096  # bytes beside its elements that a tensor takes in a file, at most


def total_bytes(tensors: Tensors, group: dist.ProcessGroup | None, layouts: Layouts = WHOLE) -> int:
    """Bytes that a checkpoint of the tensors of all ranks takes: their elements, and a frame per tensor."""
    here = sum(
        native_shape(tensor, layout_of(name, tensor, layouts)).numel() * tensor.element_size() + FRAME
        for name, tensor in tensors.items()
    )
    names = hashlib.sha256("\n".join(sorted(tensors)).encode()).digest()
    return sum(
        dict(all_gather((names, here), group)).values()
    )  # ranks with the same names have the same tensors


class _Writer(FileSystemWriter):
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # torch's zip writer dies of a failed write and covers up why
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


class _StreamWriter(FileSystemWriter):
    """Writes one file, tensor after tensor. DCP's own way keeps all tensors of a file until its end."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, results = f"{plan.storage_data.prefix}0.distcp", []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                start = file.tell()
                torch.save(planner.resolve_data(item), file)
                size = file.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def write_tensors(
    path: Path,
    tensors: Tensors,
    group: dist.ProcessGroup | None,
    layouts: Layouts = WHOLE,
    copies: Tensors | None = None,
) -> None:
    """Write `tensors` into files in the folder `path`, yet to be synced. Every rank of `group` calls it.

    Args:
        layouts: how tensor parallelism shares out the parameters they belong to.
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
        plan = WritePlan(parts_of(tensors, layouts, copies))
        save({}, storage_writer=writer, planner=plan, process_group=group, no_dist=group is None)


def stream_tensors(path: Path, outlines: Tensors, read: Callable[[str], Tensor]) -> None:
    """Write whole tensors into files in the folder `path`, yet to be synced; one process alone.

    Args:
        outlines: name -> tensor on the meta device.
        read: the named tensor's values, asked for one at a time.

    Raises:
        CheckpointError: they cannot be written, or read.
    """
    writer = _StreamWriter(path, sync_files=False)
    with _dcp(f"writing {path}", None):
        save({}, storage_writer=writer, planner=StreamPlan(parts_of(outlines, WHOLE), read), no_dist=True)


def read_tensors(
    path: Path, tensors: Tensors, group: dist.ProcessGroup | None, layouts: Layouts = WHOLE
) -> None:
    """Read the named tensors from folder `path` into the given ones, whose values it replaces.

    Only tensors of the given names are read; others in the folder are left alone. Values are cast to the
    given tensors' dtypes. Every rank of `group` calls it, each with the tensors that it holds.

    Raises:
        CheckpointError: a name is missing or has another shape, or the files cannot be read.
        PeerLost: a rank is gone.
    """
    assert not any(tensor.is_meta for tensor in tensors.values()), "give the tensors memory first"
    together(group, lambda: raise_if_any(path, _misfits(path, tensors, layouts)))
    with _dcp(f"reading {path}", group):
        plan = ReadPlan(parts_of(tensors, layouts))
        load({}, storage_reader=SafeReader(path), planner=plan, process_group=group, no_dist=group is None)


def _misfits(path: Path, tensors: Tensors, layouts: Layouts) -> list[str]:
    problems = []
    table = read_metadata(path)
    for name, tensor in tensors.items():
        entry = table.state_dict_metadata.get(name)
        shape = native_shape(tensor, layout_of(name, tensor, layouts))
        if entry is None:
            problems.append(f"{name} is missing")
        elif not isinstance(entry, TensorStorageMetadata):
            problems.append(f"{name} is not a tensor")
        elif entry.size != shape:
            problems.append(f"{name} has shape {list(entry.size)}, here {list(shape)}")
        elif not is_whole(table, name):
            problems.append(f"{name} is incomplete")  # DCP would leave the rest as it is, without a word
    return problems


def on_no_rank(names: Collection[str], tensors: Tensors, group: dist.ProcessGroup | None) -> list[str]:
    """Those of `names`, the same on every rank of `group`, that no rank has among its `tensors`."""
    here = torch.tensor([name in tensors for name in names], dtype=torch.uint8)
    if group is not None:
        with peers_alive("comparing names"):
            dist.all_reduce(here, dist.ReduceOp.MAX, group)
    return [name for name, found in zip(names, here.tolist(), strict=True) if not found]


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
