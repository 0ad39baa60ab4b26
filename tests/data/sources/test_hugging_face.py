"""Hugging Face data sets: from disk and from files, with images and captions of any kind."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.pictures import same
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.sources import open_source
from flux_trainer.data.sources.base import digest

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


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"^hf .* \(train\) cannot be loaded: "):
        open_source(Source(type="hf", path=str(tmp_path)))


PIXELS = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)


def columns(tmp_path: Path, image: object, text: object = "a") -> Source:
    """A data set of one row, saved to disk."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": [image], "text": [text]}).save_to_disk(tmp_path / "saved")
    return Source(type="hf", path=str(tmp_path / "saved"))


@pytest.mark.filterwarnings("ignore:Downcasting array")
@pytest.mark.parametrize("kind", ["path", "bytes", "struct of bytes", "struct of a path", "pixels"])
def test_images_may_be_held_in_columns_of_many_types(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    image = {
        "path": str(path),
        "bytes": path.read_bytes(),
        "struct of bytes": {"bytes": path.read_bytes()},
        "struct of a path": {"path": str(path)},
        "pixels": PIXELS.tolist(),
    }[kind]
    assert same(open_source(columns(tmp_path, image))[0], Image.fromarray(PIXELS))


@pytest.mark.parametrize("image", [[b"a"], ["a.png"], [{"bytes": b"a", "path": None}], 7, [7], {"url": "a"}])
def test_a_column_that_holds_no_images_is_named_with_its_type(tmp_path: Path, image: object) -> None:
    words = r'column "image" is of type .*; image_key must name a column that holds an image in each row\.$'
    with pytest.raises(DataError, match=words):
        open_source(columns(tmp_path, image))


@pytest.mark.parametrize("text", [["a cat", "one cat"], 7, True, {"en": "a cat"}, b"a cat", None])
def test_a_column_that_holds_no_text_is_named_with_its_type(tmp_path: Path, text: object) -> None:
    words = r'column "text" is of type .*; caption_key must name a column that holds a text in each row\.$'
    with pytest.raises(DataError, match=words):
        open_source(columns(tmp_path, b"a", text))


def test_one_column_cannot_be_image_and_caption(tmp_path: Path) -> None:
    source = columns(tmp_path, b"a").model_copy(update={"image_key": "text"})
    with pytest.raises(DataError, match=r'image_key and caption_key both name the column "text"; it has: im'):
        open_source(source)


def test_a_caption_that_is_not_utf_8_is_bad(tmp_path: Path) -> None:
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    texts = pa.array([b"caf\xe9", b"a\0c"]).view(pa.string())  # as careless writers leave it
    table = datasets.Dataset(pa.table({"image": pa.array([b"x", b"x"]), "text": texts}))
    table.save_to_disk(tmp_path / "saved")
    source = open_source(Source(type="hf", path=str(tmp_path / "saved")))
    for index, words in enumerate(['^"text" is not UTF-8 text', '^"text" holds a NUL character']):
        with pytest.raises(BadSample, match=words):
            source[index]


Rows = list[tuple[str | None, bytes | None, str | None]]
ROWS: Rows = [("a", bytes(99) + b"1", "x/1.png"), ("b", bytes(100), "x/2.png"), (None, None, None)]


def fingerprint(path: Path, rows: Rows, step: int = 1000) -> dict[str, object]:
    """Of rows of (caption, file, its name), saved in chunks of `step` rows."""
    datasets = pytest.importorskip("datasets")
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}  # saved with its folder
    features = datasets.Features({"text": datasets.Value("string"), "image": image})
    parts = [
        datasets.Dataset.from_dict(
            {
                "text": [text for text, _, _ in rows[i : i + step]],
                "image": [data and {"bytes": data, "path": name} for _, data, name in rows[i : i + step]],
            },
            features=features,
        )
        for i in range(0, len(rows), step)
    ]
    datasets.concatenate_datasets(parts).save_to_disk(path)
    source = open_source(Source(type="hf", path=str(path)))
    return source.fingerprint.as_dict()


def test_the_fingerprint_of_a_data_set_says_what_its_rows_hold(tmp_path: Path) -> None:
    """Not how, where or by which program it was made."""
    known = fingerprint(tmp_path / "a", ROWS)
    assert known == {
        "samples": 3,
        "captions": digest([b"a\xff", b"b\xff", b"\xfe"]),
        "images": digest(
            [b'["1.png", 100]', bytes(63) + b"1", b'["2.png", 100]', bytes(64), b"[null, null]", b"\xff"]
        ),
    }
    assert fingerprint(tmp_path / "b", ROWS, step=1) == known
    elsewhere: Rows = [(text, data, name and name.replace("x/", "/y/")) for text, data, name in ROWS]
    assert fingerprint(tmp_path / "c", elsewhere) == known


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        ([("A", *ROWS[0][1:]), *ROWS[1:]], {"captions"}),
        ([("ab", *ROWS[0][1:]), ("", *ROWS[1][1:]), ROWS[2]], {"captions"}),
        ([*ROWS[:2], ("", None, None)], {"captions"}),
        ([("a", bytes(99) + b"2", "x/1.png"), *ROWS[1:]], {"images"}),
        ([("a", bytes(101), "x/1.png"), *ROWS[1:]], {"images"}),
        ([("a", ROWS[0][1], "x/3.png"), *ROWS[1:]], {"images"}),
        ([ROWS[1], ROWS[0], ROWS[2]], {"captions", "images"}),
        ([*ROWS, ROWS[0]], {"samples", "captions", "images"}),
    ],
)
def test_other_rows_change_the_fingerprint(tmp_path: Path, rows: Rows, changed: set[str]) -> None:
    before, after = fingerprint(tmp_path / "a", ROWS), fingerprint(tmp_path / "b", rows)
    assert {name for name in before if before[name] != after[name]} == changed
