"""Reading torch's distributed checkpoints without trusting them.

`torch.distributed.checkpoint` (DCP) keeps its table of contents in `.metadata`, a pickle, and a pickle can
run any code when it is read. Here it may only name the few classes such a table is made of. The tensors'
own files are read with `weights_only=True`; entries that are not tensors, which DCP would unpickle freely,
are refused.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flux_trainer.checkpoint.commit import METADATA
from flux_trainer.checkpoint.errors import CheckpointError


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise CheckpointError(f"layout {name} is not that of a dense tensor")
    return torch.strided


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(type_.__module__, type_.__name__): type_ for type_ in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
    )},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,  # Python 3.13
}  # fmt: skip
_ALLOWED |= {
    ("torch", str(dtype)[6:]): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"it names {module}.{name}, which no table of tensors needs. "
                "It may have been made to run code when it is read: do not trust it."
            )
        return _ALLOWED[module, name]


def read_metadata(path: str | Path) -> metadata.Metadata:
    """The table of contents of the DCP checkpoint in folder `path`.

    Raises:
        CheckpointError: there is none, it is broken, or it contains anything but such a table (the error
        names it).
    """
    file = Path(path) / METADATA
    try:
        table = _TableUnpickler(io.BytesIO(file.read_bytes())).load()
        _check_table(table)
    except Exception as error:  # broken or hostile bytes can raise nearly anything from inside the unpickler
        raise CheckpointError(f"{file} cannot be used: {error}") from error
    return table


def _check_table(table: Any) -> None:
    if not isinstance(table, metadata.Metadata):
        raise CheckpointError("it is no table of contents")
    for name, entry in table.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata):
            raise CheckpointError(f"{name} is neither a tensor nor bytes")
    for index, place in table.storage_data.items():
        if not isinstance(index, metadata.MetadataIndex) or not isinstance(place, filesystem._StorageInfo):
            raise CheckpointError("its list of places is broken")
        if Path(place.relative_path).name != place.relative_path:
            raise CheckpointError(f"{index.fqn} lies outside the folder, at {place.relative_path!r}")


def is_whole(table: metadata.Metadata, name: str) -> bool:
    """Whether the chunks of a tensor lie somewhere and cover it, each element once."""
    entry = table.state_dict_metadata[name]
    assert isinstance(entry, metadata.TensorStorageMetadata)
    chunks = [chunk for chunk in entry.chunks if chunk.sizes.numel()]
    if any(not len(chunk.offsets) == len(chunk.sizes) == len(entry.size) for chunk in chunks):
        return False
    boxes = [[(start, start + n) for start, n in zip(c.offsets, c.sizes, strict=True)] for c in chunks]
    return (
        sum(chunk.sizes.numel() for chunk in chunks) == entry.size.numel()
        and all(0 <= a <= b <= n for box in boxes for (a, b), n in zip(box, entry.size, strict=True))
        and all(metadata.MetadataIndex(name, chunk.offsets) in table.storage_data for chunk in chunks)
        and not _overlap(boxes)
    )


def _overlap(boxes: list[list[tuple[int, int]]]) -> bool:
    """Whether any two boxes, given as (start, stop) of each dimension, share an element."""
    if len(boxes) < 2:
        return False
    cut = max(range(len(boxes[0])), key=lambda dim: len({box[dim] for box in boxes}))
    boxes = sorted(boxes, key=lambda box: box[cut])
    for i, box in enumerate(boxes):
        for other in islice(boxes, i + 1, None):
            if other[cut][0] >= box[cut][1]:
                break  # nor can those after it
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return True
    return False


class SafeReader(filesystem.FileSystemReader):
    """DCP's reader of folders, with `read_metadata` above in the place of a plain unpickling.

    What lies in a file in one run of bytes is read right into its place, where DCP would read the whole chunk
    into memory of its own and copy from there.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        table = read_metadata(Path(self.path))
        table.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return table

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        others = [item for item in plan.items if not self._read_run(item, planner)]
        return super().read_data(replace(plan, items=others), planner)

    def _read_run(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """Read what the item asks for; False, with nothing done, where it is no run of bytes."""
        place = self.storage_data[item.storage_index]
        if item.type != LoadItemType.TENSOR or place.transform_descriptors:
            return False
        with open(Path(self.path) / place.relative_path, "rb") as file:
            # On the meta device, torch reads all but the elements, and notes where they begin.
            part = torch.load(self._slice_file(file, place), map_location="meta", weights_only=True)
            begin = getattr(part.untyped_storage(), "_checkpoint_offset", None)
            for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(dim, start, size)
            target = planner.resolve_tensor(item).detach()
            if begin is None or not part.is_contiguous() or part.shape != target.shape:
                return False
            fits = target.is_cpu and target.is_contiguous() and target.dtype == part.dtype
            values = target if fits else torch.empty_like(part, device="cpu")
            begin += part.storage_offset() * part.itemsize
            file.seek(place.offset + begin)
            content = values.view(-1).view(torch.uint8).numpy().data
            if begin + part.nbytes > place.length or file.readinto(content) != part.nbytes:
                raise CheckpointError(f"{item.storage_index.fqn} is cut off in {place.relative_path}")
        if not fits:
            target.copy_(values)
        planner.commit_tensor(item, target)
        return True

    def read_chunk(self, place: filesystem._StorageInfo) -> Tensor | None:
        """The whole tensor at a place, without a second copy of it; None where it is compressed."""
        if place.transform_descriptors:
            return None
        with open(Path(self.path) / place.relative_path, "rb") as file:
            return torch.load(self._slice_file(file, place), map_location="cpu", weights_only=True)


class TensorsOnly(DefaultLoadPlanner):
    """DCP's plan of reading, for a flat dict of tensors and nothing else."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(
            f"{read_item.dest_index.fqn} is not a tensor; reading it could run foreign code"
        )
