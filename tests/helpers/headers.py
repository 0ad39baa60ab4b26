"""Safetensors files that are all header: what a model of any size looks like to who reads no values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from flux_trainer.models import keys
from flux_trainer.models.registry import FLAVORS, model_class


def shapes_of(flavor: str, layout: Literal["bfl", "diffusers"]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a flavor's tensors; diffusers' for FLUX.1 only."""
    config = FLAVORS[flavor]
    with torch.device("meta"):
        model = model_class(config)(config)
    if layout == "bfl":
        return {name: tuple(p.shape) for name, p in model.named_parameters()}
    return keys.shapes(keys.entries(model, keys.FLUX1, layout))


def write_header(path: Path, shapes: Mapping[str, Sequence[int]], **metadata: Any) -> None:
    """A file with the header of bfloat16 tensors, and a hole (no disk space) in place of their data."""
    body: dict[str, Any] = {"__metadata__": {name: json.dumps(value) for name, value in metadata.items()}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        body[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(body).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
