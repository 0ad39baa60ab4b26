"""Samples from a jsonl file."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from flux_trainer.config.text import kind
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources.base import Fingerprint, RawSample, checked, digest, read


class JsonlSource:
    """A file of JSON objects, one a line; image paths are relative to its folder. Holds line offsets only."""

    def __init__(self, path: str, image_key: str, caption_key: str, reference_key: str = "") -> None:
        if not os.path.isfile(path):
            raise DataError(f"The jsonl file {path} does not exist.")
        self.name = f"jsonl {path}"
        self.path, self.image_key, self.caption_key = path, image_key, caption_key
        self.reference_key = reference_key
        self.passed_over: Counter[str] = Counter()
        self.offsets = array("q")  # of lines that are not blank, in bytes
        named, field = False, json.dumps(reference_key).encode()

        def lines() -> Iterator[bytes]:
            nonlocal named
            position = 0
            with open(path, "rb") as file:
                for line in file:
                    if not line.isspace():
                        self.offsets.append(position)
                        named = named or field in line
                        yield line
                    position += len(line)

        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        if not encoding.startswith("utf-8"):
            raise DataError(f"{path} is {encoding.upper()} text; save it as UTF-8.")
        contents = digest(chain(lines(), [reference_key.encode()]))
        self.fingerprint = Fingerprint(len(self.offsets), (("lines", contents),))
        if reference_key and not named:
            raise DataError(f'Not one line of {path} has the field "{reference_key}" for reference images.')

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> RawSample:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            line = file.readline()
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSample(f"not a JSON line: {error}") from error
        if not isinstance(fields, dict):
            raise BadSample(f"the line is {kind(fields)}, not an object")
        if self.image_key not in fields:
            raise BadSample(f'the line has no "{self.image_key}" (it has: {", ".join(fields)})')
        folder, name = os.path.dirname(self.path), fields[self.image_key]
        if not isinstance(name, str):
            raise BadSample(f'"{self.image_key}" is {kind(name)}, not a path')
        if fields.get(self.caption_key) is None:
            raise BadSample(f'no caption in "{self.caption_key}" (the line has: {", ".join(fields)})')
        caption = checked(fields[self.caption_key], f'"{self.caption_key}"')
        references = tuple(os.path.join(folder, name) for name in self._references(fields))
        image = os.path.join(folder, name)
        return RawSample(read(image), caption, image, references)

    def _references(self, fields: dict[str, Any]) -> list[str]:
        names = fields.get(self.reference_key) or [] if self.reference_key else []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadSample(f'"{self.reference_key}" is neither a path nor a list of paths')
        return names
