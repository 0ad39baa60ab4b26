"""Samples from a folder of image files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import chain

from flux_trainer.config import text
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources.base import Fingerprint, RawSample, checked, digest, read, spread
from flux_trainer.data.sources.listing import CAPTION, Listing, images_named


class FolderSource:
    """All images below a folder, in the order of their paths, each with its caption in a `.txt` next to it.

    The images of the same name below other folders are its references.
    """

    def __init__(self, path: str, reference_paths: Sequence[str] = ()) -> None:
        self.name = f"folder {path}"
        self.root = path
        listing = Listing(path)
        self.files, self.captions = listing.images, listing.captions
        self.passed_over: Counter[str] = listing.passed_over
        stems = [os.path.splitext(file)[0] for file in self.files]
        self.references: list[list[str]] = [[] for _ in stems]
        for folder in reference_paths:
            found = images_named(set(stems), folder, self.passed_over)
            if not found:
                raise DataError(f"No image in {folder} has the name of one in {path}, to be its reference.")
            for stem, references in zip(stems, self.references, strict=True):
                if stem in found:
                    references.append(os.path.join(folder, found[stem]))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> RawSample:
        path = os.path.join(self.root, self.files[index])
        return RawSample(read(path), self.caption(index), path, tuple(self.references[index]))

    def caption(self, index: int) -> str:
        """The caption of an image. Raises BadSample where there is none that can be used."""
        stem = os.path.splitext(self.files[index])[0]
        path = os.path.join(self.root, self.captions.get(stem, stem + CAPTION))
        data = read(path)
        try:
            return checked(text.decode(data), path)
        except text.TextError as error:
            raise BadSample(f"{path} {error}") from error

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of all names, and of as many captions as are read in no time. Images are not looked at."""
        names = chain(self.files, *self.references)
        return Fingerprint(
            len(self.files),
            (
                ("files", digest(os.fsencode(name) + b"\n" for name in names)),
                ("captions", digest(self._caption_bytes(index) for index in spread(len(self.files)))),
            ),
        )

    def _caption_bytes(self, index: int) -> bytes:
        try:
            return self.caption(index).encode() + b"\xff"  # a byte that text cannot hold
        except BadSample:
            return b"\xff"
