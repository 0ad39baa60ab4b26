"""Tiny data sets, written to a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_trainer.config.schema import Source

Picture = Callable[[int], Image.Image]


@pytest.fixture
def picture() -> Picture:
    """picture(number): noise of 24 x 16 pixels, the same for the same number."""

    def make(number: int) -> Image.Image:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def jsonl(tmp_path: Path, picture: Picture) -> Callable[..., Source]:
    """jsonl(count, name, broken) writes `count` images, those in `broken` as rubbish, and their list."""

    def write(count: int, name: str = "set", broken: tuple[int, ...] = ()) -> Source:
        folder = tmp_path / name
        folder.mkdir()
        with (folder / "list.jsonl").open("w") as file:
            for i in range(count):
                if i in broken:
                    (folder / f"{i}.png").write_bytes(b"rubbish")
                else:
                    picture(i).save(folder / f"{i}.png")
                file.write(json.dumps({"file_name": f"{i}.png", "text": f"{name} {i}"}) + "\n")
        return Source(type="jsonl", path=str(folder / "list.jsonl"))

    return write
