"""What all sources have in common: how they are opened, and how they are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.sources import FolderSource, SyntheticSource, open_source

Picture = Callable[[int], Image.Image]


def test_synthetic_samples_are_keyed() -> None:
    source = open_source(Source(type="synthetic", size=5))
    assert isinstance(source, SyntheticSource)
    assert len(source) == 5
    assert source[3].caption == "synthetic sample 3"
    first, again, other = (np.array(source[i].image) for i in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 100 < first.mean() < 155
    assert source.fingerprint != SyntheticSource(4).fingerprint


def test_captions_are_read_for_a_fingerprint_only_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation never asks."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    seen: list[int] = []
    monkeypatch.setattr(FolderSource, "caption", lambda self, index: seen.append(index) or "a")
    source = FolderSource(str(tmp_path))
    assert seen == []
    assert source.fingerprint == source.fingerprint
    assert seen == [0]


def test_missing_and_empty_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for section, words in (
        (Source(type="folder"), "has no path"),
        (Source(type="folder", path=str(tmp_path / "nowhere")), "nowhere does not exist"),
        (Source(type="folder", path=str(tmp_path)), "holds no samples"),
        (Source(type="jsonl", path=str(tmp_path / "no.jsonl")), r"no\.jsonl does not exist"),
        (Source(type="jsonl", path=str(tmp_path / "empty.jsonl")), "holds no samples"),
    ):
        with pytest.raises(DataError, match=words):
            open_source(section)
