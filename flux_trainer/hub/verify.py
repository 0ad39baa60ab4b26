"""Is a set of weights what it should be? What it is, and everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.load import verify as verify_checkpoint
from flux_trainer.hub.contents import read_contents
from flux_trainer.hub.dcp import DcpFolder
from flux_trainer.hub.detect import PIPELINE, Component, Place, locate
from flux_trainer.hub.errors import WeightsError
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
    if (path / PIPELINE).is_file():
        report = Report(path / PIPELINE)
        with _noted(report):
            if parts := _parts(path):
                return [_one(path / part, part, config) for part in parts]
        if report.problems:
            return [report]
    return [_one(path, "transformer", config)]


def _parts(pipeline: Path) -> list[Component]:
    """Which of a pipeline's parts its list names, or are there."""
    try:
        listed = json.loads((pipeline / PIPELINE).read_bytes())
        if not isinstance(listed, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise WeightsError(f"{pipeline / PIPELINE} is no list of a pipeline's parts: {error}.") from error
    known: list[Component] = ["transformer", "vae"]
    left_out = (None, [None, None])  # how diffusers writes that a pipeline goes without a part
    return [part for part in known if listed.get(part) not in left_out or (pipeline / part).is_dir()]


def _one(path: Path, component: Component, config: Any | None) -> Report:
    report = Report(path)
    with _noted(report):
        place = locate(path, component)
        report.path = place.path
        report.facts["format"] = _FORMATS[place.kind]
        with _noted(report):
            report.facts["content"] = _content(place)
        report.facts |= dict(_model(place, component, config))
    return report


@contextmanager
def _noted(report: Report) -> Iterator[None]:
    """Whatever is wrong inside becomes a problem of the report, once."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))


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
        files = read_contents(place.path).headers
        yield "files", f"{len(files)}, as the index says"


def _content(place: Place) -> str:
    """Compare hashes or checksums, if there are any; in words what was compared."""
    if place.kind == "checkpoint":
        verify_checkpoint(place.path)
        return "every file is as it was written (SHA-256)"
    if place.kind == "dcp":
        return "names, shapes and sizes fit; the format has no hashes"
    headers = read_contents(place.path).headers
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
