"""A folder of captioned images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

Picture = Callable[[int], Image.Image]


@pytest.fixture
def folder(tmp_path: Path, picture: Picture) -> Path:
    (tmp_path / "b").mkdir()
    for number, name in enumerate(["b/1.png", "a.PNG", "c.webp"]):
        picture(number).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        (tmp_path / name).with_suffix(".txt").write_text(f" caption {number}\n")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"a file system's shadow")
    return tmp_path
