"""What every source of samples has in common."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from flux_trainer.data.bad import BadSample


class RawSample(NamedTuple):
    """An image (a file's bytes, or decoded), its caption, the words that lead a reader to it, and the files
    of the images that it refers to."""

    image: bytes | Image.Image
    caption: str
    origin: str
    references: tuple[str, ...] = ()


class ImageSource(Protocol):
    """A random-access list of captioned images. `source[i]` raises BadSample where item i cannot be used."""

    name: str
    fingerprint: str
    """Of the list: it changes when an index may mean another sample. Contents of images are not looked at."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


def digest(parts: Iterable[bytes]) -> str:
    """A short hash of the parts put together."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def read(path: str) -> bytes:
    """A file's bytes; BadSample if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte in it
        raise BadSample(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error


def checked(caption: object, where: str) -> str:
    """The caption without surrounding blanks; BadSample if there is none."""
    if not isinstance(caption, str) or not caption.strip():
        raise BadSample(f"no caption in {where}")
    return caption.strip()
