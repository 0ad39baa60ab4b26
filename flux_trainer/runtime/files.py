"""Files that survive a crash: written whole or not at all, on the disk when the call returns. No torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

_CHUNK = 2**20  # bytes read at once: large against a system call, small against a core's cache
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that git, without git-lfs, has left in the place of a large one."""


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file so that a reader, or a crash, meets the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, as `write_text` does. Floats keep every bit."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync(path: str | Path) -> None:
    """Put a file's content on the disk; a folder's: the names created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path, start: int = 0, size: int | None = None) -> str:
    """SHA-256 of a file in hex, as `sha256sum` prints it; memory does not grow with the file.

    Of `size` bytes from `start` on, or of all that are left. Threads that call it work side by side.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer if size is None else buffer[:size]):
            digest.update(buffer[:count])
            size = size if size is None else size - count
    return digest.hexdigest()


def sentence(error: BaseException) -> str:
    """An error's text; of the system's errors the reason and the file, without the number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def ensure_space(folder: str | Path, needed: int) -> None:
    """Raise OSError (ENOSPC) when the disk of `folder` has fewer than `needed` bytes left for us.

    Some network file systems tell no size at all; those are believed to have room.
    """
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed / 1e9:.3g} GB and its disk has {usage.free / 1e9:.3g} GB left. "
            "Make room, or choose another folder.",
        )
