"""A folder written by torch's distributed checkpoints (DCP), this trainer's or another's: read box by box.

Its table of contents goes through `checkpoint.metadata`, which lets no pickle run code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from flux_trainer.checkpoint.commit import METADATA
from flux_trainer.checkpoint.metadata import SafeReader, is_whole, read_metadata
from flux_trainer.checkpoint.plan import Part, ReadPlan
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.source import Extent, Stored


class DcpFolder:
    """A `Source`: the tensors of a DCP folder. Entries that are no tensors are left alone."""

    def __init__(self, path: Path, prefix: str = "", ahead: bool = False) -> None:
        """
        Args:
            prefix: only tensors whose names begin so are there, without it.
            ahead: a tensor is read whole and kept until the next one is asked for. For who wants all of it in
                small boxes: one that is no run of rows is cut out of its whole chunk, however small it is.

        Raises:
            WeightsError: a file is missing or cut off, or a tensor is not all there.
            CheckpointError: the table of contents is broken or hostile.
        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self.bytes_read = 0
        self._prefix = prefix
        self._ahead = ahead
        self._kept: tuple[str, Tensor] = ("", torch.empty(0))
        self._table = read_metadata(path)
        self._reader = SafeReader(path)
        self._reader.set_up_storage_reader(self._table, is_coordinator=True)
        self.tensors: dict[str, Stored] = {}
        self._single: set[str] = set()  # tensors of one chunk
        problems = []
        for name, entry in self._table.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and name.startswith(prefix):
                self.tensors[name.removeprefix(prefix)] = Stored(tuple(entry.size), entry.properties.dtype)
                if len(entry.chunks) == 1:
                    self._single.add(name.removeprefix(prefix))
                if not is_whole(self._table, name):
                    problems.append(f"{name} is incomplete")
        needed: dict[str, int] = {}
        for place in self._table.storage_data.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        for file, size in sorted(needed.items()):
            if not (path / file).is_file():
                problems.append(f"{file} is missing")
            elif (path / file).stat().st_size < size:
                problems.append(f"{file} is cut off")
        if problems:
            raise WeightsError(f"{path} is not whole by its {METADATA}: {'; '.join(problems)}.")

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        shape = self.tensors[name].shape
        if not self._ahead:
            return self._load(name, offsets, sizes)
        if self._kept[0] != name:
            self._kept = ("", torch.empty(0))  # free it before the next one comes
            self._kept = (name, self._load(name, (0,) * len(shape), shape))
        part = self._kept[1]
        for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            part = part.narrow(dim, start, size)
        return part

    def extent(self, name: str, row: int) -> Extent | None:
        return None  # in an archive, chunk by chunk

    def _load(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        stored = self.tensors[name]
        full = self._prefix + name
        if tuple(sizes) == stored.shape and name in self._single:
            place = self._table.storage_data[MetadataIndex(full, torch.Size(offsets))]
            whole = self._reader.read_chunk(place)
            if whole is not None and whole.dtype == stored.dtype and tuple(whole.shape) == stored.shape:
                self.bytes_read += whole.nbytes
                return whole
        values = torch.empty(tuple(sizes), dtype=stored.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        plan = ReadPlan(
            {MetadataIndex(full, chunk.offsets): Part(full, torch.Size(stored.shape), chunk, values)}
        )
        plan.set_up_planner({}, self._table, is_coordinator=True)
        self._reader.read_data(plan.create_local_plan(), plan).wait()
        self.bytes_read += values.nbytes
        return values
