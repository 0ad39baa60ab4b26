"""Writing weights without holding them: safetensors as a stream."""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flux_trainer.hub.source import NAMES, Extent, Stored

CHECKSUM = "flux_trainer_crc32"
"""Key of the metadata with the CRC-32 of all bytes after the header, in hex: it finds damage, not forgery.

SHA-256 would find no more of it and take longer than the copying itself."""

_BLANK = "0" * 8
_NO_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}
_CHUNK = 8 * 2**20

Blocks = Callable[[str], Iterator[tuple[Tensor, Extent | None]]]
"""The rows of the named tensor in order, block by block, and where a file has the same bytes, if one does."""


def header(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file with `tensors` in their order, up to its data."""
    body: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, stored in tensors.items():
        begin, end = end, end + stored.nbytes
        body[name] = {"dtype": NAMES[stored.dtype], "shape": stored.shape, "data_offsets": [begin, end]}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Stored],
    blocks: Blocks,
    metadata: Mapping[str, str],
    progress: Callable[[int], None],
) -> None:
    """Write a file, holding a block at a time; it is on the disk on return.

    Its metadata get the data's checksum, which a thread computes beside the writing.

    Args:
        progress: called with the number of bytes after each block.
    """
    # Widest first, as readers expect: then each tensor lies at a multiple of its element's size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    start = header(tensors, {"format": "pt", **metadata, CHECKSUM: _BLANK})
    place = start.index(f'"{CHECKSUM}":"{_BLANK}"'.encode()) + len(CHECKSUM) + 4
    with open(path, "wb", buffering=0) as file, _Checksum() as checksum, _Flush(file.fileno()):
        _write_all(file.write, memoryview(start))
        for name, stored in tensors.items():
            count = 0
            for block, extent in blocks(name):
                assert block.dtype == stored.dtype, name
                data = block.reshape(-1).view(torch.uint8).numpy().data
                checksum.update(data)
                if extent is None or not _copy(extent, file.fileno(), len(data)):
                    _write_all(file.write, data)
                count += len(data)
                progress(len(data))
            assert count == stored.nbytes, name
        file.seek(place)
        file.write(checksum.hex().encode())
        os.fsync(file.fileno())


def _copy(extent: Extent, target: int, count: int) -> bool:
    """Let the kernel copy bytes to the end of a file, which saves a third of the time; False if it cannot."""
    offset = extent.offset
    while hasattr(os, "copy_file_range") and offset < extent.offset + count:
        try:
            done = os.copy_file_range(extent.descriptor, target, extent.offset + count - offset, offset)
        except OSError as error:
            if offset == extent.offset and error.errno in _NO_COPY:
                return False
            raise
        if not done:
            raise OSError(errno.EIO, "a file became shorter while it was read")
        offset += done
    return offset > extent.offset


def _write_all(write: Callable[[memoryview], int], data: memoryview) -> None:
    while len(data):
        data = data[write(data) :]


def checksum(path: Path, start: int) -> str:
    """CRC-32 of a file's bytes from `start` on, in hex."""
    value = 0
    with open(path, "rb") as file:
        file.seek(start)
        while data := file.read(_CHUNK):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


class _Flush:
    """Puts a file on the disk while it is being written, so that its end has little to wait for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._error: OSError | None = None

    def __enter__(self) -> None:
        self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop.wait(0.1):
                os.fsync(self._descriptor)
        except OSError as error:  # the system tells of it once
            self._error = error

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error


class _Checksum:
    """CRC-32 in a thread of its own, a few blocks behind."""

    def __enter__(self) -> _Checksum:
        self._value = 0
        self._queue: queue.Queue[memoryview | None] = queue.Queue(2)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def _work(self) -> None:
        while (data := self._queue.get()) is not None:
            self._value = zlib.crc32(data, self._value)

    def update(self, data: memoryview) -> None:
        self._queue.put(data)

    def hex(self) -> str:
        self._queue.put(None)
        self._thread.join()
        return f"{self._value:08x}"

    def __exit__(self, *error: object) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
