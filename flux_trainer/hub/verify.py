"""Is a set of weights what it should be? What it is, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.load import verify as verify_checkpoint
from flux_trainer.hub.dcp import DcpFolder
from flux_trainer.hub.detect import PIPELINE, Place, locate
from flux_trainer.hub.families import Component
from flux_trainer.hub.safetensors_files import SafetensorsFiles
from flux_trainer.hub.weights import EMA, open_weights
from flux_trainer.hub.write import CHECKSUM, checksum


@dataclass
class Report:
    """What lies at a path."""

    path: Path
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Empty: it is whole."""


def verify(path: str | Path, config: Any | None = None) -> list[Report]:
    """Look at all weights that `path` means: one set, or each part of a pipeline's folder.

    Reads every byte where there is a hash or checksum to compare with, tables of contents otherwise.

    Args:
        config: which model it must be; found out if None.
    """
    path = Path(path).expanduser()
    parts: list[Component] = ["transformer", "vae"]
    if (path / PIPELINE).is_file() and any((path / part).is_dir() for part in parts):
        return [_one(path / part, part, config) for part in parts if (path / part).is_dir()]
    return [_one(path, "transformer", config)]


def _one(path: Path, component: Component, config: Any | None) -> Report:
    report = Report(path)
    try:
        place = locate(path, component)
        report.path = place.path
        report.facts["format"] = _FORMATS[place.kind]
        report.facts |= dict(_model(place, component, config))
        report.facts["content"] = _content(place)
    except (CheckpointError, OSError) as error:
        report.problems.append(str(error))
    return report


_FORMATS = {
    "safetensors": "safetensors",
    "checkpoint": "checkpoint of this trainer",
    "dcp": "checkpoint of another trainer (DCP)",
}


def _model(place: Place, component: Component, config: Any | None) -> Iterator[tuple[str, str]]:
    weights = open_weights(place, component, config)
    yield "model", weights.describe()
    yield "config", ", ".join(f"{k} {v}" for k, v in weights.family.fields(weights.config).items())
    stored = [weights.source.tensors[name] for name in weights.names.values()]
    count = sum(torch.Size(tensor.shape).numel() for tensor in stored)
    yield "parameters", f"{count:,} in {len(stored)} tensors, {sum(t.nbytes for t in stored) / 1e9:.3g} GB"
    if place.kind != "safetensors":
        everything = DcpFolder(place.path).tensors
        average = any(name.startswith(EMA) for name in everything)
        if average:
            open_weights(place, component, weights.config, ema=True)
        yield "average", "present" if average else "none"
        yield "optimizer", "present" if any(n.startswith("optimizer.") for n in everything) else "none"
    elif place.path.suffix == ".json":
        files = {file.name for file in SafetensorsFiles(place.path).headers}
        yield "files", f"{len(files)}, as the index says"


def _content(place: Place) -> str:
    """Compare hashes or checksums, if there are any; in words what was compared."""
    if place.kind == "checkpoint":
        verify_checkpoint(place.path)
        return "every file is as it was written (SHA-256)"
    if place.kind == "dcp":
        return "names, shapes and sizes fit; the format has no hashes"
    headers = SafetensorsFiles(place.path).headers
    hashed = {file: header for file, header in headers.items() if CHECKSUM in header.metadata}
    changed = [
        file.name
        for file, header in hashed.items()
        if checksum(file, header.start) != header.metadata[CHECKSUM]
    ]
    if changed:
        raise CheckpointError(f"{', '.join(changed)}: the data are not those that were written (CRC-32).")
    if len(hashed) < len(headers):
        return "names, shapes and sizes fit; there is no checksum to compare the data with"
    return "the data are as they were written (CRC-32)"
