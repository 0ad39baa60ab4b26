"""Every kind of source on a tiny generated set: what it reads, in which order, and how it complains."""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.image import decode
from flux_trainer.data.sources import FolderSource, JsonlSource, RawSample, SyntheticSource, open_source

Picture = Callable[[int], Image.Image]


def same(sample: RawSample, expected: Image.Image) -> bool:
    return np.array_equal(np.array(decode(sample.image, 10**6)), np.array(expected))


@pytest.fixture
def folder(tmp_path: Path, picture: Picture) -> Path:
    (tmp_path / "b").mkdir()
    for number, name in enumerate(["b/1.png", "a.PNG", "c.webp"]):
        picture(number).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        (tmp_path / name).with_suffix(".txt").write_text(f" caption {number}\n")
    (tmp_path / "notes.md").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"a file system's shadow")
    return tmp_path


def test_folder_is_recursive_sorted_and_captioned(folder: Path, picture: Picture) -> None:
    source = open_source(Source(type="folder", path=str(folder)))
    assert isinstance(source, FolderSource)
    assert source.files == ["a.PNG", "b/1.png", "c.webp"]
    assert [source[i].caption for i in range(3)] == ["caption 1", "caption 0", "caption 2"]
    assert same(source[0], picture(1))
    assert same(source[2], picture(2))


def test_folder_reports_missing_empty_and_unreadable_captions(folder: Path) -> None:
    source = FolderSource(str(folder))
    (folder / "a.txt").unlink()
    with pytest.raises(BadSample, match=r"cannot read .*a\.txt"):
        source[0]
    (folder / "a.txt").write_text("  \n")
    with pytest.raises(BadSample, match="no caption"):
        source[0]
    (folder / "a.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(BadSample, match="UTF-8"):
        source[0]
    (folder / "b/1.png").unlink()
    with pytest.raises(BadSample, match=r"cannot read .*1\.png: No such file"):
        source[1]


def test_jsonl_reads_lines_at_random(tmp_path: Path, picture: Picture) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "images" / f"{i}.png")
    lines = [
        json.dumps({"path": f"images/{i}.png", "words": f"größe {i}"}, ensure_ascii=False) for i in range(3)
    ]
    (tmp_path / "list.jsonl").write_text("\ufeff" + lines[0] + "\n\n  \n" + lines[1] + "\r\n" + lines[2])
    section = Source(type="jsonl", path=str(tmp_path / "list.jsonl"), image_key="path", caption_key="words")
    source = pickle.loads(pickle.dumps(open_source(section)))
    assert len(source) == 3
    for i in (2, 0, 1):
        assert source[i].caption == f"größe {i}"
        assert same(source[i], picture(i))


def test_jsonl_reports_bad_lines(tmp_path: Path) -> None:
    cases = {
        '{"file_name": ': "not a JSON line",
        '["a.png"]': "no object",
        '{"image": "a.png", "text": "a"}': 'no "file_name" .it has: image, text',
        '{"file_name": "no.png", "text": "a"}': "No such file",
        '{"file_name": "no.png"}': "no caption",
        '{"file_name": "no.png", "text": " "}': "no caption",
        '{"file_name": "no.png", "text": 7}': "no caption",
        '{"file_name": "a\\u0000.png", "text": "a"}': "cannot read .* null",
    }
    (tmp_path / "list.jsonl").write_text("\n".join(cases))
    source = JsonlSource(str(tmp_path / "list.jsonl"), "file_name", "text")
    assert len(source) == len(cases)
    for i, reason in enumerate(cases.values()):
        with pytest.raises(BadSample, match=reason):
            source[i]


def test_synthetic_samples_are_keyed() -> None:
    source = open_source(Source(type="synthetic", size=5))
    assert isinstance(source, SyntheticSource)
    assert len(source) == 5
    assert source[3].caption == "synthetic sample 3"
    first, again, other = (np.array(source[i].image) for i in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 100 < first.mean() < 155


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


def test_a_fingerprint_tells_lists_apart(folder: Path, picture: Picture, tmp_path: Path) -> None:
    """It changes with what an index means: a file more, another caption in a line; not with the place."""
    before = FolderSource(str(folder)).fingerprint
    assert FolderSource(str(folder)).fingerprint == before
    picture(9).save(folder / "b/0.png")
    assert FolderSource(str(folder)).fingerprint != before

    lines = tmp_path / "a.jsonl"
    lines.write_text('{"file_name": "a", "text": "x"}\n')
    first = JsonlSource(str(lines), "file_name", "text").fingerprint
    (tmp_path / "copy.jsonl").write_text("\n" + lines.read_text())  # a blank line is no sample
    assert JsonlSource(str(tmp_path / "copy.jsonl"), "file_name", "text").fingerprint == first
    lines.write_text('{"file_name": "a", "text": "y"}\n')
    assert JsonlSource(str(lines), "file_name", "text").fingerprint != first
    assert SyntheticSource(3).fingerprint != SyntheticSource(4).fingerprint
