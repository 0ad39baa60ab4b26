"""What every source of samples has in common."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image

from flux_trainer.config import text
from flux_trainer.data.bad import BadSample
from flux_trainer.runtime.files import LFS_POINTER

SAMPLED = 4096
"""Of so many samples, evenly spread, a fingerprint may look at what each costs a read of its own."""


class RawSample(NamedTuple):
    """An image (a file's bytes, or decoded), its caption, the words that lead a reader to it, and the files
    of the images that it refers to."""

    image: bytes | Image.Image
    caption: str
    origin: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fingerprint:
    """What an index of a source means: it changes when an index may mean another sample."""

    samples: int
    """How many there are."""
    parts: tuple[tuple[str, str], ...] = ()
    """(What was looked at, its hash), such as ("captions", "0c5f..."); the names are plural nouns."""

    def as_dict(self) -> dict[str, Any]:
        """As checkpoints store it."""
        return {"samples": self.samples, **dict(self.parts)}


class ImageSource(Protocol):
    """A random-access list of captioned images. `source[i]` raises BadSample where item i cannot be used."""

    name: str
    passed_over: Counter[str]
    """How many there were of what is no sample, by what it is, such as "hidden folder"."""

    @property
    def fingerprint(self) -> Fingerprint:
        """May read much, so it is computed when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


def digest(parts: Iterable[bytes]) -> str:
    """A short hash of the parts put together."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def spread(count: int) -> Iterator[int]:
    """Up to SAMPLED of the indices below `count`, evenly spread."""
    most = min(count, SAMPLED)
    return (i * count // most for i in range(most))


def read(path: str) -> bytes:
    """A file's bytes; BadSample if it cannot be read, or git has left a pointer in its place."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte or a lone surrogate in it
        raise BadSample(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
    if data.startswith(LFS_POINTER):
        raise BadSample(f"{path} is a git-lfs pointer; `git lfs pull` fetches the file itself")
    return data


def checked(caption: Any, where: str) -> str:
    """The caption without surrounding blanks; BadSample if there is none, or it is no text."""
    if caption is None:
        raise BadSample(f"no caption in {where}")
    try:
        stripped = text.trimmed(text.usable(caption))
    except text.TextError as error:
        raise BadSample(f"{where} {error}") from error
    if not stripped:
        raise BadSample(f"no caption in {where}")
    return stripped
