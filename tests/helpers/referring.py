"""A small data set whose samples refer to other images: some to none, some to several, of different sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(32, 32), (48, 16), (16, 64)]
"""Width and height of reference images; all have at most the area of 32 x 32."""


def picture(number: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Noise, the same for the same number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_referring(folder: Path, counts: tuple[int, ...] = (1, 0, 2, 3, 0, 1, 2)) -> Path:
    """`folder`/list.jsonl with a sample for each of `counts`, the number of its references, and
    `folder`/prompts.jsonl with three prompts that refer to 2, 0 and 1 images; returns the former."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(SIZES):
        picture(1000 + number, size).save(folder / f"reference{number}.png")
    samples = []
    for i, count in enumerate(counts):
        picture(i).save(folder / f"{i}.png")
        names = [f"reference{(i + k) % len(SIZES)}.png" for k in range(count)]
        samples.append({"file_name": f"{i}.png", "text": f"sample {i}", "references": names})
    prompts = [
        {"prompt": "a", "references": ["reference0.png", "reference1.png"]},
        {"prompt": "b"},
        {"prompt": "c", "references": "reference2.png"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def referring_flags(folder: Path) -> list[str]:
    """Settings of a run, and of its validation, on what `write_referring(folder)` wrote."""
    settings = {
        "data.max_references": 3,
        "data.reference_size": 32,
        "validation.prompts_path": folder / "prompts.jsonl",
        "validation.prompts": "[]",
    }
    for section in ("data", "validation"):
        settings[f"{section}.sources.0.type"] = "jsonl"
        settings[f"{section}.sources.0.path"] = folder / "list.jsonl"
        settings[f"{section}.sources.0.reference_key"] = "references"
    return [f"--{key}={value}" for key, value in settings.items()]
