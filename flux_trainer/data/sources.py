"""Where samples come from: a folder, a jsonl file, a Hugging Face data set, or nothing at all (synthetic).

A source is a random-access list of (image, caption, reference images). It reads and does not decode; it holds
no open file, so that workers can inherit or unpickle it. A new kind is a class like these and a line in
`open_source`.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.image import EXTENSIONS
from flux_trainer.flow.rng import Purpose, uniform


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


def open_source(section: Source) -> ImageSource:
    """The source that a [[data.sources]] table describes. Raises DataError if it is missing or empty."""
    if section.type == "synthetic":
        return SyntheticSource(section.size)
    if not section.path:
        raise DataError(f'A source of type "{section.type}" has no path.')
    image_key = section.image_key or {"jsonl": "file_name", "hf": "image"}.get(section.type, "")
    caption_key = section.caption_key or "text"
    source: ImageSource
    if section.type == "folder":
        source = FolderSource(section.path, section.reference_paths)
    elif section.type == "jsonl":
        source = JsonlSource(section.path, image_key, caption_key, section.reference_key)
    else:
        source = HuggingFaceSource(section.path, section.split, image_key, caption_key)
    if len(source) == 0:
        raise DataError(f"{source.name} holds no samples.")
    return source


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
        caption_path = os.path.splitext(path)[0] + ".txt"
        try:
            caption = read(caption_path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(f"{caption_path} is not UTF-8") from error
        return RawSample(read(path), checked(caption, caption_path), path, tuple(self.references[index]))


class JsonlSource:
    """A file of JSON objects, one a line; image paths are relative to its folder. Holds line offsets only."""

    def __init__(self, path: str, image_key: str, caption_key: str, reference_key: str = "") -> None:
        if not os.path.isfile(path):
            raise DataError(f"The jsonl file {path} does not exist.")
        self.name = f"jsonl {path}"
        self.path, self.image_key, self.caption_key = path, image_key, caption_key
        self.reference_key = reference_key
        self._named, field = False, json.dumps(reference_key).encode()
        self.offsets = array("q")  # of lines that are not blank, in bytes

        def lines() -> Iterator[bytes]:
            position = 0
            with open(path, "rb") as file:
                for line in file:
                    if not line.isspace():
                        self.offsets.append(position)
                        self._named = self._named or field in line
                        yield line
                    position += len(line)

        self.fingerprint = digest(chain(lines(), [reference_key.encode()]))
        if reference_key and not self._named:
            raise DataError(f'Not one line of {path} has the field "{reference_key}" for reference images.')

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> RawSample:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise BadSample(f"not a JSON line: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get(self.image_key), str):
            keys = ", ".join(fields) if isinstance(fields, dict) else "no object"
            raise BadSample(f'the line has no "{self.image_key}" (it has: {keys})')
        folder = os.path.dirname(self.path)
        image = os.path.join(folder, fields[self.image_key])
        caption = checked(fields.get(self.caption_key), f'"{self.caption_key}"')
        names = fields.get(self.reference_key) or [] if self.reference_key else []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadSample(f'"{self.reference_key}" is neither a path nor a list of paths')
        references = tuple(os.path.join(folder, name) for name in names)
        return RawSample(read(image), caption, image, references)


class HuggingFaceSource:
    """A split of a Hugging Face data set, from the hub or from a folder written by `save_to_disk`."""

    def __init__(self, path: str, split: str, image_key: str, caption_key: str) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise DataError(
                'A source of type "hf" needs the package datasets: pip install "flux_trainer[hf]"'
            ) from error
        self.name = f"hf {path} ({split})"
        self.image_key, self.caption_key = image_key, caption_key
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            table: Any = datasets.load_from_disk(path)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise DataError(f'{path} has no split "{split}"; it has: {", ".join(table)}.')
                table = table[split]
        else:
            table = datasets.load_dataset(path, split=split)
        for key, setting in ((image_key, "image_key"), (caption_key, "caption_key")):
            if key not in table.column_names:
                columns = ", ".join(table.column_names)
                raise DataError(f'{self.name} has no column "{key}"; it has: {columns}. Set {setting}.')
        table = table.select_columns([image_key, caption_key])
        self.table = table.cast_column(image_key, datasets.Image(decode=False))  # rows give the file's bytes
        self.fingerprint = f"{len(table)} rows"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> RawSample:
        row = self.table[index]
        image = row[self.image_key]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadSample("no image")
        data = image["bytes"] if image["bytes"] is not None else read(image["path"])
        caption = checked(row[self.caption_key], f'"{self.caption_key}"')
        return RawSample(data, caption, image["path"] or f"row {index}")


class SyntheticSource:
    """Smooth random colours, the same in every run: for benchmarks, and to try a setup without data."""

    PATCHES = 16

    def __init__(self, size: int) -> None:
        self.name = "synthetic"
        self.size = size
        self.fingerprint = f"{size} samples"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> RawSample:
        shape = (self.PATCHES, self.PATCHES, 3)
        colours = uniform(0, Purpose.SYNTHETIC, torch.tensor([index]), shape)[0] * 256
        name = f"synthetic sample {index}"
        return RawSample(Image.fromarray(colours.to(torch.uint8).numpy()), name, name)


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
