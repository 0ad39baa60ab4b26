"""Samples from a Hugging Face data set."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources.base import Fingerprint, RawSample, checked, read, spread

_TAIL = 64  # bytes; a PNG's hold the checksum of its last pixels, a JPEG's the last pixels
_END, _NONE = b"\xff", b"\xfe"  # bytes that text cannot hold


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
        self.passed_over: Counter[str] = Counter()
        table = self._load(path, split)
        self._check_columns(table.features)
        table = table.select_columns([image_key, caption_key])
        self.table = table.cast_column(image_key, datasets.Image(decode=False))  # rows give the file's bytes

    def _load(self, path: str, split: str) -> Any:
        import datasets

        try:
            if not any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json")):
                return datasets.load_dataset(path, split=split)
            table: Any = datasets.load_from_disk(path)
        except Exception as error:  # the library's own kinds, the network's, pyarrow's
            raise DataError(f"{self.name} cannot be loaded: {str(error) or type(error).__name__}") from error
        if not isinstance(table, datasets.DatasetDict):
            return table
        if split not in table:
            raise DataError(f'{path} has no split "{split}"; it has: {", ".join(table)}.')
        return table[split]

    def _check_columns(self, features: Any) -> None:
        if self.image_key == self.caption_key:
            raise DataError(
                f'{self.name}: image_key and caption_key both name the column "{self.image_key}"; '
                f"it has: {', '.join(features)}."
            )
        for key, setting, holds, what in (
            (self.image_key, "image_key", _is_image, "an image"),
            (self.caption_key, "caption_key", _is_text, "a text"),
        ):
            if key not in features:
                raise DataError(
                    f'{self.name} has no column "{key}"; it has: {", ".join(features)}. Set {setting}.'
                )
            if not holds(features[key]):
                kind = str(features[key])
                kind = kind if len(kind) <= 80 else kind[:77] + "..."
                raise DataError(
                    f'{self.name}: column "{key}" is of type {kind}; {setting} must name a column '
                    f"that holds {what} in each row."
                )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> RawSample:
        try:
            row = self.table[index]
        except UnicodeDecodeError as error:
            raise BadSample(f'"{self.caption_key}" is not UTF-8 text: {error}') from error
        image = row[self.image_key]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise BadSample("no image")
        data = image["bytes"] if image["bytes"] is not None else read(image["path"])
        caption = checked(row[self.caption_key], f'"{self.caption_key}"')
        return RawSample(data, caption, image["path"] or f"row {index}")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Of all captions, of the names and lengths of all images, and of the last bytes of some.

        The library's own fingerprint says how the table was made, which differs between machines.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        captions, images = (hashlib.blake2b(digest_size=8) for _ in range(2))
        looked_at = set(spread(len(self)))
        row = 0
        for batch in self.table.with_format("arrow").iter(1000):  # without copies
            files = pc.struct_field(batch[self.image_key], "bytes")
            texts = batch[self.caption_key].cast(pa.large_binary()).to_pylist()
            lengths = pc.binary_length(files).to_pylist()
            names = pc.struct_field(batch[self.image_key], "path").to_pylist()
            for i, (text, length, name) in enumerate(zip(texts, lengths, names, strict=True)):
                captions.update(_NONE if text is None else text + _END)
                tail = pc.binary_slice(files.slice(i, 1), -_TAIL)[0].as_py() if row in looked_at else None
                images.update(json.dumps([name and _base(name), length]).encode() + (tail or _END))
                row += 1
        return Fingerprint(row, (("captions", captions.hexdigest()), ("images", images.hexdigest())))


def _base(path: str) -> str:
    """A file's name without its folder, which differs between machines; also of `zip://a.png::archive.zip`."""
    return os.path.basename(path.partition("::")[0])


def _is_image(feature: Any) -> bool:
    """Whether a column can be read as images: as such, as files' bytes or paths, or as arrays of pixels."""
    import datasets

    if isinstance(feature, dict):
        return bool(feature) and feature.keys() <= {"bytes", "path"}
    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_") in ("binary", "string")
    depth = 0
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
        depth += 1
    if depth:
        numbers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float"))
        return numbers and depth in (2, 3)
    return isinstance(feature, (datasets.Image, datasets.Array2D, datasets.Array3D))


def _is_text(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "string_view")
