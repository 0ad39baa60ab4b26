"""Hugging Face data sets: from disk and from files, with images and captions of any kind."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pictures import same
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources import open_source

Picture = Callable[[int], Image.Image]


def test_hugging_face_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "flux_trainer\[hf\]"'):
        open_source(Source(type="hf", path="somebody/something"))


@pytest.fixture
def table(tmp_path: Path, picture: Picture):
    """Images held as bytes, as a path, as rubbish, not at all; and a caption that is missing."""
    datasets = pytest.importorskip("datasets")
    buffer = io.BytesIO()
    picture(0).save(buffer, "PNG")
    picture(1).save(tmp_path / "1.png")
    images = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": None, "path": str(tmp_path / "1.png")}]
    images += [{"bytes": b"rubbish", "path": "x.png"}, None, images[0]]
    columns = {"image": images, "text": ["zero", "one", "two", "three", None], "other": [0] * 5}
    table = datasets.Dataset.from_dict(columns)
    return table.cast_column("image", datasets.Image())


def test_hugging_face_from_disk(tmp_path: Path, table, picture: Picture) -> None:
    table.save_to_disk(tmp_path / "saved")
    source = pickle.loads(pickle.dumps(open_source(Source(type="hf", path=str(tmp_path / "saved")))))
    assert len(source) == 5
    assert [source[i].caption for i in range(3)] == ["zero", "one", "two"]
    assert same(source[0], picture(0))
    assert same(source[1], picture(1))
    assert source[2].image == b"rubbish"  # decoding is not the source's business
    with pytest.raises(BadSample, match="no image"):
        source[3]
    with pytest.raises(BadSample, match="no caption"):
        source[4]


def test_hugging_face_splits_and_columns(tmp_path: Path, table) -> None:
    import datasets

    datasets.DatasetDict({"small": table.select(range(2))}).save_to_disk(tmp_path / "splits")
    section = Source(type="hf", path=str(tmp_path / "splits"), split="small")
    assert len(open_source(section)) == 2
    with pytest.raises(DataError, match='no split "train"; it has: small'):
        open_source(section.model_copy(update={"split": "train"}))
    with pytest.raises(DataError, match='no column "caption"; it has: image, text, other'):
        open_source(section.model_copy(update={"caption_key": "caption"}))


def test_hugging_face_load_dataset_of_a_parquet_file(
    tmp_path: Path, table, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "repo").mkdir()
    table.to_parquet(str(tmp_path / "repo" / "train.parquet"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = open_source(Source(type="hf", path=str(tmp_path / "repo")))
    assert source[1].caption == "one"
    assert isinstance(source[0].image, bytes)
    assert Image.open(io.BytesIO(source[0].image)).size == (24, 16)
