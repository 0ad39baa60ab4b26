"""What files of weights say of their model: read from headers and JSON beside them, without torch.

`hub` reads the same files with all care when it opens them; here they are asked for the flavor only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux_trainer.config.problems import ConfigError
from flux_trainer.models.recognise import of_config, of_shapes

INDEX = ".safetensors.index.json"
_NOTE = "flux_trainer"  # in a file's metadata, as hub.weights.NOTE
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def read_fields(place: Path) -> dict[str, Any] | None:
    """Fields of the model's config, as far as the file, the files of an index or the checkpoint say them.

    Returns:
        {} for weights of something else, None for a checkpoint that does not say what it holds.

    Raises:
        ConfigError: a file is damaged or missing.
    """
    if place.is_dir():
        state = place / "state.json"
        note = _json(state).get("model") if state.is_file() else None
        return of_config(note) if isinstance(note, dict) else None
    headers = [_header(file) for file in _files(place)]
    shapes = {
        name: record["shape"]
        for header in headers
        for name, record in header.items()
        if isinstance(record, dict) and isinstance(record.get("shape"), list)
    }
    shown = of_shapes(shapes)
    return shown and {**shown, **_stated(place, headers[0])}


def _stated(place: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the writer left in the header, else in a config beside it that is a transformer's."""
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict) and _NOTE in metadata:
        try:
            note = json.loads(metadata[_NOTE])
        except (TypeError, ValueError) as error:
            raise ConfigError([f"{place}: the note in its header is damaged: {error}"]) from error
        return of_config(note) if isinstance(note, dict) else {}
    beside = place.parent / "config.json"
    return of_config(_json(beside)) if beside.is_file() else {}


def _files(place: Path) -> list[Path]:
    if not place.name.endswith(INDEX):
        return [place]
    names = _json(place).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ConfigError([f"{place}: it has no map from tensors to files"])
    files = [place.parent / Path(str(name)).name for name in sorted(set(map(str, names.values())))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError([f"{place}: it names files that are not beside it: {', '.join(missing)}"])
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read as JSON: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: not a JSON object"])
    return values


def _header(path: Path) -> dict[str, Any]:
    """A safetensors file's table of contents."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= min(path.stat().st_size - 8, _LONGEST_HEADER):
            raise ConfigError([f"{path}: not a safetensors file, or cut off"])
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise ConfigError([f"{path}: not a safetensors file: {error}"]) from error
    if not isinstance(header, dict):
        raise ConfigError([f"{path}: not a safetensors file: its header is no object"])
    return header
