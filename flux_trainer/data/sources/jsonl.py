"""Samples from a jsonl file."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from itertools import chain

from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources.base import RawSample, checked, digest, read


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
