"""Where samples come from: a folder, a jsonl file, a Hugging Face data set, or nothing at all (synthetic).

A source is a random-access list of (image, caption, reference images). It reads and does not decode; it holds
no open file, so that workers can inherit or unpickle it. A new kind is a class like these and a line in
`open_source`.
"""

from __future__ import annotations

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.sources.base import ImageSource, RawSample
from flux_trainer.data.sources.folder import FolderSource
from flux_trainer.data.sources.hugging_face import HuggingFaceSource
from flux_trainer.data.sources.jsonl import JsonlSource
from flux_trainer.data.sources.synthetic import SyntheticSource

__all__ = [
    "FolderSource",
    "HuggingFaceSource",
    "ImageSource",
    "JsonlSource",
    "RawSample",
    "SyntheticSource",
    "open_source",
]


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
