"""Where the elements that a rank holds lie in the native tensor.

Two cuts may lie between a native tensor and what a rank holds. Tensor parallelism takes parts of one
dimension and lines them up (`Layout`); FSDP then cuts the result along its first dimension (a DTensor's
placements). `boxes` undoes both: the rank's part is a list of boxes of the native tensor. Initial weights and
checkpoints, which must not depend on the mesh, go through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Layout:
    """Which part of a native tensor a tensor-parallel rank holds. A tensor without one is held whole."""

    shape: tuple[int, ...]
    """Of the native tensor."""
    dim: int
    """The dimension that is shared out."""
    sections: tuple[tuple[int, int], ...]
    """(native start, length) along `dim` of the pieces that this rank holds, in their order here."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part, before FSDP."""
        length = sum(length for _, length in self.sections)
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])


Layouts = Mapping[str, Layout]
"""By native name, of the parameters that tensor parallelism shares out."""
WHOLE: Layouts = MappingProxyType({})
"""Where there is no tensor parallelism."""


def share_out(shape: Sequence[int], dim: int, sections: Sequence[int], rank: int, degree: int) -> Layout:
    """The layout of `rank` among `degree` ranks that divide each of the sections along `dim` evenly.

    Args:
        sections: their sizes, which add up to `shape[dim]`.
    """
    assert sum(sections) == shape[dim], f"{sections} along dimension {dim} of {tuple(shape)}"
    assert all(size % degree == 0 for size in sections), f"{sections} over {degree} ranks"
    pieces, start = [], 0
    for size in sections:
        part = size // degree
        pieces.append((start + rank * part, part))
        start += size
    return Layout(tuple(shape), dim, tuple(pieces))


@dataclass(frozen=True)
class Box:
    """A block of elements of a native tensor."""

    offsets: tuple[int, ...]
    """Of its first element in the native tensor."""
    sizes: tuple[int, ...]
    local_offsets: tuple[int, ...]
    """Of its first element in this rank's part."""

    def of(self, part: Tensor) -> Tensor:
        """A view of this box in the rank's part."""
        for dim, (start, length) in enumerate(zip(self.local_offsets, self.sizes, strict=True)):
            part = part.narrow(dim, start, length)
        return part


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def native_shape(tensor: Tensor, layout: Layout | None) -> torch.Size:
    return tensor.shape if layout is None else torch.Size(layout.shape)


def boxes(tensor: Tensor, layout: Layout | None) -> list[Box]:
    """The boxes of the native tensor that make up `local(tensor)`; none where this rank holds nothing.

    Args:
        tensor: a plain tensor, or a DTensor whose mesh says nothing of tensor parallelism.
        layout: that of tensor parallelism, if it shares this tensor out.
    """
    assert layout is None or tuple(tensor.shape) == layout.local_shape, f"{tensor.shape} is not {layout}"
    sizes, offsets = tuple(tensor.shape), (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        sizes, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    if 0 in sizes:
        return []
    if layout is None:
        return [Box(tuple(offsets), tuple(sizes), (0,) * tensor.ndim)]
    found, dim, end = [], layout.dim, 0
    for start, length in layout.sections:
        begin, end = end, end + length  # of the section, in the tensor that FSDP cuts
        first, last = max(begin, offsets[dim]), min(end, offsets[dim] + sizes[dim])
        if first < last:
            found.append(
                Box(
                    _replace(offsets, dim, start + first - begin),
                    _replace(sizes, dim, last - first),
                    _replace((0,) * tensor.ndim, dim, first - offsets[dim]),
                )
            )
    return found


def _replace(values: Sequence[int], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])
