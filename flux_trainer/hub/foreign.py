"""What a file is that does not begin as a safetensors file does: told by its first bytes. No torch."""

from __future__ import annotations

import zipfile
from pathlib import Path

from flux_trainer.hub.errors import WeightsError
from flux_trainer.runtime.files import LFS_POINTER

PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
"""Suffixes of files that may run code when they are read."""


def unreadable(path: Path, why: str) -> WeightsError:
    """The error of a file that should be safetensors."""
    return WeightsError(f"{path} is not a readable safetensors file: {why}. Fetch it again.")


def what_else(path: Path) -> str:
    """A sentence that says what a file is that does not begin as a safetensors file does."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        data = file.read(1024)
    if data.startswith(LFS_POINTER):
        return _pointer(path)
    if data.startswith(b"GGUF"):
        return f"{path} is a GGUF file of quantised weights. Fetch the safetensors file they were made from."
    if data.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml", b"<error")):
        return (
            f"{path} is a web page, not weights: as a rule, one that asks to log in or to accept a licence. "
            "Fetch it with `hf download` after `hf auth login`."
        )
    if size and _is_pickle(path, data):
        return (
            f"{path} is a pickle, which can run any code when it is read, and is not opened. "
            "Fetch the safetensors file of the same weights."
        )
    return str(unreadable(path, _damage(size, data)))


def check_no_pointer(path: Path) -> None:
    """Raise WeightsError where git has left a pointer in the place of a large file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise WeightsError(_pointer(path))


def _pointer(path: Path) -> str:
    """What to say of a pointer."""
    return (
        f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in {path.absolute().parent}, "
        "or fetch the file."
    )


def _damage(size: int, data: bytes) -> str:
    if size == 0:
        return "it is empty"
    if data.startswith(b"PK\x03\x04"):
        return "it is a zip archive, which must be unpacked, or is cut off"
    if not any(data):
        return "it begins with zeros, as of a download that did not finish"
    text = data.decode("ascii", "replace")
    if text.isascii() and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"it is text that begins with {text[:40]!r}"
    return "its header is damaged, or it is of another kind"


def _is_pickle(path: Path, data: bytes) -> bool:
    """torch.save's zip archive, or a bare pickle of any protocol that writes its number."""
    if data.startswith(b"PK\x03\x04"):
        if not zipfile.is_zipfile(path):  # cut off
            return path.suffix.lower() in PICKLES
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    protocols = tuple(bytes([0x80, number]) for number in range(2, 6))
    return path.suffix.lower() in PICKLES or data.startswith(protocols)
