"""Samples from a folder of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain

from flux_trainer.config import text
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.image import EXTENSIONS
from flux_trainer.data.sources.base import RawSample, checked, digest, read


class FolderSource:
    """All images below a folder, in the order of their paths, each with its caption in a `.txt` beside it.

    The images of the same name below other folders are its references.
    """

    def __init__(self, path: str, reference_paths: Sequence[str] = ()) -> None:
        self.name = f"folder {path}"
        self.root = path
        self.files = images_below(path)
        stems = [os.path.splitext(file)[0] for file in self.files]
        self.references: list[list[str]] = [[] for _ in stems]
        for folder in reference_paths:
            names = images_below(folder)
            found = {os.path.splitext(file)[0]: file for file in names}
            if len(found) < len(names):
                twice = next(file for file in names if found[os.path.splitext(file)[0]] != file)
                raise DataError(f"{folder} has several images for one name, of which one is {twice}.")
            if not found.keys() & set(stems):
                raise DataError(f"No image in {folder} has the name of one in {path}, to be its reference.")
            for stem, references in zip(stems, self.references, strict=True):
                if stem in found:
                    references.append(os.path.join(folder, found[stem]))
        self.fingerprint = digest(os.fsencode(file) + b"\n" for file in chain(self.files, *self.references))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> RawSample:
        path = os.path.join(self.root, self.files[index])
        return RawSample(read(path), self.caption(index), path, tuple(self.references[index]))

    def caption(self, index: int) -> str:
        """The caption of an image. Raises BadSample where there is none that can be used."""
        path = os.path.splitext(os.path.join(self.root, self.files[index]))[0] + ".txt"
        data = read(path)
        try:
            return checked(text.decode(data), path)
        except text.TextError as error:
            raise BadSample(f"{path} {error}") from error


def images_below(path: str) -> list[str]:
    """The image files below a folder, relative to it, sorted. Raises DataError if there is no such folder."""
    if not os.path.isdir(path):
        raise DataError(f"The image folder {path} does not exist.")
    return sorted(
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, files in os.walk(path)
        for file in files
        if os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith(".")
    )
