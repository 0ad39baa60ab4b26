"""One safetensors file, or several with an index: mapped into memory, so that a box costs what it holds.

`contents` reads and checks the headers; the tensors come from the safetensors library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_trainer.hub.contents import Contents
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.foreign import unreadable
from flux_trainer.hub.source import DTYPES, Extent, Stored


class SafetensorsFiles:
    """A `Source`: the tensors of one file, or of all files that an index names."""

    def __init__(self, contents: Contents) -> None:
        """Raises WeightsError where safetensors or torch cannot read a tensor."""
        self.path = contents.path
        self.tensors: dict[str, Stored] = {}
        self.metadata = contents.metadata
        self.bytes_read = 0
        self._where: dict[str, Any] = {}
        self._extents: dict[str, Extent] = {}
        self._files: list[BinaryIO] = []
        for file, header in contents.headers.items():
            for name, record in header.tensors.items():
                if record.dtype not in DTYPES:
                    raise WeightsError(
                        f"{file}: {name} has dtype {record.dtype}, which torch has no name for. "
                        "Fetch a file in bfloat16."
                    )
                self.tensors[name] = Stored(record.shape, DTYPES[record.dtype])
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise unreadable(file, str(error)) from error
            self._where |= dict.fromkeys(header.tensors, handle)
            self._files.append(open(file, "rb"))  # noqa: SIM115 (as long as this object)
            number = self._files[-1].fileno()
            self._extents |= {name: Extent(number, record.offset) for name, record in header.tensors.items()}

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
