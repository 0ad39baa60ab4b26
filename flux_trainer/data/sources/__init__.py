"""Where samples come from: a folder, a jsonl file, a Hugging Face data set, or nothing at all (synthetic).

A source is a random-access list of (image, caption, reference images). It reads and does not decode; it holds
no open file, so that workers can inherit or unpickle it. A new kind is a class like these and a line in
`open_source`.
"""

from __future__ import annotations

from collections import Counter

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.image import EXTENSIONS
from flux_trainer.data.sources.base import Fingerprint, ImageSource, RawSample
from flux_trainer.data.sources.folder import FolderSource
from flux_trainer.data.sources.hugging_face import HuggingFaceSource
from flux_trainer.data.sources.jsonl import JsonlSource
from flux_trainer.data.sources.synthetic import SyntheticSource
from flux_trainer.runtime.log import logger

__all__ = [
    "Fingerprint",
    "FolderSource",
    "HuggingFaceSource",
    "ImageSource",
    "JsonlSource",
    "RawSample",
    "SyntheticSource",
    "open_source",
]


def open_source(section: Source) -> ImageSource:
    """The source that a [[data.sources]] table describes. Logs its size, and what it passes over.

    Raises:
        DataError: it is missing or empty.
    """
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
    passed_over = f"; passed over: {_listed(source.passed_over)}" if source.passed_over else ""
    if len(source) == 0:
        known = f". Images are files named {', '.join(sorted(EXTENSIONS))}" if passed_over else ""
        raise DataError(f"{source.name} holds no samples{passed_over}{known}.")
    logger.info(f"{source.name}: {_number(len(source), 'sample')}{passed_over}")
    return source


def _listed(things: Counter[str], most: int = 12) -> str:
    """Such as "3 hidden folders, 1 .heic file": what has no suffix first, then the most frequent ones."""
    named = sorted(things.items(), key=lambda item: (item[0].startswith("."), -item[1], item[0]))[:most]
    others = things.total() - sum(count for _, count in named)
    words = [_number(count, thing) for thing, count in named]
    return ", ".join([*words, f"{others:,} more"] if others else words)


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
