"""Folders of images: what is read, in which order, what is passed over, and how they complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.pictures import same
from PIL import Image

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import BadSample
from flux_trainer.data.sources import FolderSource, open_source
from flux_trainer.data.sources.base import SAMPLED, digest, spread

Picture = Callable[[int], Image.Image]


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
    for data, words in (
        (b"caf\xe9", "is not UTF-8 text"),
        ("a cat".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "holds a NUL character"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a git-lfs pointer"),
    ):
        (folder / "a.txt").write_bytes(data)
        with pytest.raises(BadSample, match=rf"a\.txt {words}"):
            source[0]
    (folder / "b/1.png").unlink()
    with pytest.raises(BadSample, match=r"cannot read .*1\.png: No such file"):
        source[1]


def test_the_fingerprint_of_a_folder_tells_files_from_captions(
    folder: Path, picture: Picture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def parts() -> dict[str, object]:
        return FolderSource(str(folder)).fingerprint.as_dict()

    before = parts()
    assert before["samples"] == 3
    assert before["files"] == digest([b"a.PNG\nb/1.png\nc.webp\n"])  # as in the first checkpoints
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy)
    assert FolderSource(str(copy)).fingerprint.as_dict() == before
    (folder / "a.txt").write_text("another caption")
    changed = parts()
    assert {name for name in before if before[name] != changed[name]} == {"captions"}
    (folder / "a.txt").unlink()
    assert parts()["captions"] not in (before["captions"], changed["captions"])
    picture(9).save(folder / "b/0.png")
    assert parts()["files"] != before["files"]


def test_of_many_captions_a_fingerprint_reads_some_from_end_to_end() -> None:
    assert list(spread(3)) == [0, 1, 2]
    some = list(spread(1_000_000))
    assert len(some) == len(set(some)) == SAMPLED
    assert (some[0], some[-1]) == (0, 999_755)
