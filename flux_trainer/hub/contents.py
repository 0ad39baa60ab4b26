"""What files of weights hold: headers of safetensors files, and indexes. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from flux_trainer.hub.errors import WeightsError, grouped
from flux_trainer.hub.foreign import check_no_pointer, unreadable, what_else

NOTE = "flux_trainer"
"""Key of a safetensors file's metadata under which this trainer says which model it holds: JSON."""

INDEX_SUFFIX = ".safetensors.index.json"
_INDEX = re.compile(r"\.safetensors\.index(\.[\w-]+)?\.json$")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_DTYPE = re.compile(r"(?:F|BF|I|U|C)(\d+)(?:_\w+)?|BOOL")


def is_index(path: Path) -> bool:
    """Whether it is called as the index of several files is, a variant's (`.index.fp16.json`) included."""
    return bool(_INDEX.search(path.name))


class Record(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    """By safetensors' name: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    offset: int
    """Where it begins in the file, in bytes."""

    @property
    def nbytes(self) -> int:
        return _nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Header:
    """The table of contents of a safetensors file."""

    tensors: dict[str, Record]
    metadata: dict[str, str]
    start: int
    """Where the data begins in the file; it reaches to the end."""


@dataclass(frozen=True)
class Contents:
    """The tables of contents of one file, or of all files that an index names."""

    path: Path
    """The file or the index."""
    headers: dict[Path, Header]
    """By file."""

    @property
    def tensors(self) -> dict[str, Record]:
        return {name: record for header in self.headers.values() for name, record in header.tensors.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """Notes that the writer left in the files."""
        return {key: text for header in self.headers.values() for key, text in header.metadata.items()}


def read_contents(path: Path) -> Contents:
    """Read and check the headers of `path`, a safetensors file or an index.

    Raises:
        WeightsError: a file is missing, damaged or of another kind, or does not hold what the index says.
    """
    if not is_index(path):
        return Contents(path, {path: read_header(path)})
    index = read_index(path)
    files = [path.parent / name for name in sorted(set(index.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(
            f"{path} names files that are not beside it: {', '.join(missing)}. Fetch them again."
        )
    contents = Contents(path, {file: read_header(file) for file in files})
    _compare(contents, index)
    return contents


def read_header(path: Path) -> Header:
    """Read and check a file's header against its size.

    Raises:
        WeightsError: it is no safetensors file (the sentence says what it is instead), or it is cut off.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begins = file.read(1)
        if begins != b"{" or length > _LONGEST_HEADER:
            raise WeightsError(what_else(path))
        if length > size - 8:
            raise unreadable(path, f"it is cut off: it has {size} bytes, and its header alone {8 + length}")
        try:
            body = json.loads(begins + file.read(length - 1))
            metadata = {str(k): str(v) for k, v in (body.pop("__metadata__", None) or {}).items()}
            records = {name: _record(record) for name, record in body.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(path, f"its header is damaged ({error})") from error
    end = 0
    for name, (dtype, shape, (first, last)) in sorted(records.items(), key=lambda item: item[1][2]):
        if not _DTYPE.fullmatch(dtype):
            raise WeightsError(f"{path}: {name} has dtype {dtype}, which is not known. Fetch it in bfloat16.")
        if first != end or last - first != _nbytes(dtype, shape):
            raise unreadable(path, f"{name} does not lie where its shape and dtype say")
        end = last
    if 8 + length + end != size:
        cut = "it is cut off: " if 8 + length + end > size else ""
        raise unreadable(path, f"{cut}it has {size} bytes and its header speaks of {8 + length + end}")
    tensors = {
        name: Record(dtype, tuple(shape), 8 + length + first)
        for name, (dtype, shape, (first, _)) in records.items()
    }
    return Header(tensors, metadata, 8 + length)


def _record(record: Mapping[str, Any]) -> tuple[str, list[int], tuple[int, int]]:
    first, last = record["data_offsets"]
    numbers = [*record["shape"], first, last]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError("a size or place is no whole number")
    return str(record["dtype"]), record["shape"], (first, last)


def _nbytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """The dtype's name says its bits; several of less than a byte share one."""
    match = _DTYPE.fullmatch(dtype)
    assert match, dtype
    return prod(shape) * int(match[1] or 8) // 8


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded set."""
    check_no_pointer(index)
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is damaged: it has no map from tensors to files.") from error
    if not names:
        raise WeightsError(f"{index} is damaged: its map from tensors to files is empty.")
    if outside := sorted({file for file in names.values() if Path(file).name != file}):
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}.")
    return names


def _compare(contents: Contents, index: Mapping[str, str]) -> None:
    problems = []
    places = {name: file.name for file, header in contents.headers.items() for name in header.tensors}
    if absent := grouped(name for name, file in index.items() if places.get(name) != file):
        problems.append(f"not in the files it names: {', '.join(absent)}")
    if extra := grouped(name for name in places if name not in index):
        problems.append(f"in the files and not in the index: {', '.join(extra)}")
    if sum(len(header.tensors) for header in contents.headers.values()) != len(places):
        problems.append("some tensor is in two files")
    if problems:
        raise WeightsError(f"{contents.path} does not fit its files: {'; '.join(problems)}.")
