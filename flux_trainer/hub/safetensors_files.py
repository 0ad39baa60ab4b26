"""One safetensors file, or several with an index: mapped into memory, so that a box costs what it holds.

The headers are read and checked here, for sentences that say what is wrong with a file; the tensors come from
the safetensors library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_trainer.hub.errors import WeightsError, grouped
from flux_trainer.hub.source import DTYPES, Extent, Stored

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True)
class Header:
    """The table of contents of a safetensors file."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    start: int
    """Where the data begins in the file; it reaches to the end."""
    offsets: dict[str, int]
    """Where each tensor begins in the file."""


def read_header(path: Path) -> Header:
    """Read and check a file's header against its size.

    Raises:
        WeightsError: it is no safetensors file, is cut off, or holds what no weights are made of.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _unreadable(path, "its first bytes are no header's length, or it is cut off")
        try:
            body = json.loads(file.read(length))
            metadata = {str(k): str(v) for k, v in (body.pop("__metadata__", None) or {}).items()}
            records = {name: _record(record) for name, record in body.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, f"its header is damaged ({error})") from error
    end = 0
    for name, (dtype, shape, (first, last)) in sorted(records.items(), key=lambda item: item[1][2]):
        if dtype not in DTYPES:
            raise WeightsError(
                f"{path}: {name} has dtype {dtype}, which torch has no name for. Fetch a file in bfloat16."
            )
        expected = prod(shape) * DTYPES[dtype].itemsize
        if first != end or last - first != expected:
            raise _unreadable(path, f"{name} does not lie where its shape and dtype say")
        end = last
    if 8 + length + end != size:
        raise _unreadable(path, f"it has {size} bytes and its header speaks of {8 + length + end}")
    tensors = {name: Stored(tuple(shape), DTYPES[dtype]) for name, (dtype, shape, _) in records.items()}
    offsets = {name: 8 + length + first for name, (_, _, (first, _)) in records.items()}
    return Header(tensors, metadata, 8 + length, offsets)


def _record(record: Mapping[str, Any]) -> tuple[str, list[int], tuple[int, int]]:
    first, last = record["data_offsets"]
    numbers = [*record["shape"], first, last]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a size or place is no whole number")
    return str(record["dtype"]), record["shape"], (first, last)


def _unreadable(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path} is not a readable safetensors file: {why}. Fetch it again.")


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded set."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is damaged: it has no map from tensors to files.") from error
    if outside := sorted({file for file in names.values() if Path(file).name != file}):
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}.")
    return names


class SafetensorsFiles:
    """A `Source`: the tensors of one file, or of all files that an index names."""

    def __init__(self, path: Path) -> None:
        """path: a safetensors file, or an index (`*.safetensors.index.json`).

        Raises:
            WeightsError: a file is missing or damaged, or does not hold what the index says.
        """
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.metadata: dict[str, str] = {}
        self.bytes_read = 0
        self.headers: dict[Path, Header] = {}
        """By file."""
        index = read_index(path) if path.name.endswith(INDEX_SUFFIX) else None
        files = [path] if index is None else [path.parent / name for name in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise WeightsError(
                f"{path} names files that are not beside it: {', '.join(missing)}. Fetch them again."
            )
        self._where: dict[str, Any] = {}
        self._extents: dict[str, Extent] = {}
        self._files: list[BinaryIO] = []
        for file in files:
            header = self.headers[file] = read_header(file)
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise _unreadable(file, str(error)) from error
            self.tensors |= header.tensors
            self.metadata |= header.metadata
            self._where |= dict.fromkeys(header.tensors, handle)
            self._files.append(open(file, "rb"))  # noqa: SIM115 (as long as this object)
            number = self._files[-1].fileno()
            self._extents |= {name: Extent(number, offset) for name, offset in header.offsets.items()}
        if index is not None:
            self._compare(index)

    def _compare(self, index: Mapping[str, str]) -> None:
        problems = []
        places = {name: file.name for file, header in self.headers.items() for name in header.tensors}
        if absent := grouped(name for name, file in index.items() if places.get(name) != file):
            problems.append(f"not in the files it names: {', '.join(absent)}")
        if extra := grouped(name for name in places if name not in index):
            problems.append(f"in the files and not in the index: {', '.join(extra)}")
        if sum(len(header.tensors) for header in self.headers.values()) != len(places):
            problems.append("some tensor is in two files")
        if problems:
            raise WeightsError(f"{self.path} does not fit its files: {'; '.join(problems)}.")

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        part = self._where[name].get_slice(name)[
            tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        ]
        self.bytes_read += part.nbytes
        return part

    def extent(self, name: str, row: int) -> Extent | None:
        stored, place = self.tensors[name], self._extents[name]
        row_bytes = stored.nbytes // stored.shape[0] if stored.shape and stored.shape[0] else 0
        return Extent(place.descriptor, place.offset + row * row_bytes)
