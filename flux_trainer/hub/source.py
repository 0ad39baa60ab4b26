"""Tensors that lie on disk, whatever the files: names, shapes and dtypes at once, values box by box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Extent(NamedTuple):
    """Where bytes lie in an open file."""

    descriptor: int
    offset: int


class Source(Protocol):
    """An open set of tensors. Opening reads tables of contents only."""

    path: Path
    """What was opened, for messages."""
    tensors: dict[str, Stored]
    metadata: dict[str, str]
    """Notes that the writer left in the file; none in most formats."""

    @property
    def bytes_read(self) -> int:
        """Of the boxes that were asked for so far."""

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of `sizes` elements from `offsets` on, on the CPU; it may share memory with the file."""
        ...

    def extent(self, name: str, row: int) -> Extent | None:
        """Where the rows from `row` on lie as plain bytes, one after another; None if they do not."""
        ...


class Completed:
    """A `Source` with scalar zeros, whole numbers, in place of counters that it lacks."""

    def __init__(self, source: Source, absent: Sequence[str]) -> None:
        self.path, self.metadata = source.path, source.metadata
        self.tensors = {**source.tensors, **dict.fromkeys(absent, Stored((), torch.int64))}
        self._source, self._absent = source, absent

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        if name in self._absent:
            return torch.zeros((), dtype=torch.int64)
        return self._source.read(name, offsets, sizes)

    def extent(self, name: str, row: int) -> Extent | None:
        return None if name in self._absent else self._source.extent(name, row)


DTYPES: dict[str, torch.dtype] = {  # by safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # No weights, but what may lie beside them.
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
