"""Who writes and reads which part of which tensor: DCP's plans, made of boxes of the native tensors.

Files hold native shapes and row order whatever the mesh was, so that any mesh reads what any other wrote.
Ranks may hold different tensors; those that hold the same box agree on who writes it, and each reads its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from flux_trainer.checkpoint.metadata import TensorsOnly
from flux_trainer.runtime.layout import Layout, Layouts, boxes, local, native_shape

Tensors = Mapping[str, Tensor]


def layout_of(name: str, tensor: Tensor, layouts: Layouts) -> Layout | None:
    """Averages and moments lie as their parameter does; the optimizer's step counts are scalars."""
    if name.startswith("optimizer.state."):
        name = name.removeprefix("optimizer.state.").rpartition(".")[0]
    return layouts.get(name.removeprefix("ema.")) if tensor.ndim else None


@dataclass(frozen=True)
class Part:
    """A box of a native tensor that this rank holds."""

    name: str
    shape: torch.Size
    """Of the native tensor."""
    chunk: ChunkStorageMetadata
    """The box."""
    values: Tensor
    """Its elements, a view of what the rank holds."""


Parts = dict[MetadataIndex, Part]


def parts_of(tensors: Tensors, layouts: Layouts, copies: Tensors | None = None) -> Parts:
    """All that this rank holds of `tensors`, taken from `copies` of its local parts if there are any."""
    parts = {}
    for name, tensor in tensors.items():
        layout = layout_of(name, tensor, layouts)
        held = local(tensor) if copies is None else copies[name]
        for box in boxes(tensor, layout):
            chunk = ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            part = Part(name, native_shape(tensor, layout), chunk, box.of(held))
            parts[MetadataIndex(name, chunk.offsets)] = part
    return parts


class WritePlan(DefaultSavePlanner):
    """DCP's plan of writing; boxes that several ranks hold are written by one of them."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=index,
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        part.chunk, properties=TensorProperties(part.values.dtype), size=part.shape
                    ),
                )
                for index, part in self.parts.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index].values


class StreamPlan(WritePlan):
    """A plan of writing whole tensors that are fetched one by one, when their turn comes."""

    def __init__(self, parts: Parts, read: Callable[[str], Tensor]) -> None:
        super().__init__(parts)
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.read(index.fqn)


class ReadPlan(TensorsOnly):
    """DCP's plan of reading, for a table of contents that has every one of the parts."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "DCP sets the planner up first"
        items = []
        for part in self.parts.values():
            saved = self.metadata.state_dict_metadata[part.name]
            assert isinstance(saved, TensorStorageMetadata), f"{part.name} is not a tensor"
            items += create_read_items_for_chunk_list(part.name, saved, [part.chunk])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.parts[index].values
