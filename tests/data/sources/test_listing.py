"""Which files below a folder are samples, which links are followed, and what is said of the rest."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_trainer.config.schema import Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.sources import FolderSource, open_source
from flux_trainer.data.sources.listing import Listing, images_named
from flux_trainer.runtime.log import logger


def put(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    return root


def listed(root: Path) -> list[str]:
    return Listing(str(root)).images


def test_hidden_folders_and_those_of_other_programs_are_passed_over(tmp_path: Path) -> None:
    hidden = (
        ".ipynb_checkpoints/a.png",
        "b/.thumbnails/a.png",
        "@eaDir/a.png",
        "b/__MACOSX/c/a.png",
        ".b.png",
    )
    found = Listing(str(put(tmp_path / ".data", "a.png", "b/c.png", ".b.png", *hidden)))
    assert found.images == ["a.png", "b/c.png"]
    assert found.passed_over == {"hidden folder": 4, "hidden file": 1}


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    data, other = put(tmp_path / "data", "b/a.png"), put(tmp_path / "other", "c.png", "d/e.png")
    put(tmp_path / "third", "f.png")
    (data / "a").symlink_to(other)
    (other / "more").symlink_to(tmp_path / "third")  # found only behind the first link
    (data / "b/one.png").symlink_to(other / "c.png")
    assert listed(data) == ["a/c.png", "a/d/e.png", "a/more/f.png", "b/a.png", "b/one.png"]
    (tmp_path / "link").symlink_to(data)
    assert listed(tmp_path / "link") == listed(data)


def test_links_that_loop_or_repeat_do_no_harm(tmp_path: Path) -> None:
    data, other = put(tmp_path / "data", "a.png", "b/c.png"), put(tmp_path / "other", "d.png")
    (data / "loop").symlink_to(data)
    (data / "b/up").symlink_to("..")
    (data / "above").symlink_to(tmp_path)
    (data / "again").symlink_to(data / "b")
    (data / "x").symlink_to(other)
    (data / "y").symlink_to(other)
    (other / "back").symlink_to(data)
    (other / "self").symlink_to(other)
    (data / "itself").symlink_to(data / "itself")
    (data / "gone").symlink_to(tmp_path / "no disk here")
    found = Listing(str(data))
    assert found.images == ["a.png", "b/c.png", "x/d.png"]
    assert found.passed_over == {"looping link": 4, "repeated link": 3, "broken link": 2}


def test_the_order_is_not_the_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = put(tmp_path / "data", "b.png", "a/c.png", "d/e.png"), put(tmp_path / "other", "f/g.png")
    for name, target in (("y", other), ("x", other / "f"), ("d/z", other)):
        (data / name).symlink_to(target)
    expected, walk = listed(data), os.walk

    def reversed_walk(*words: object, **more: object) -> Iterator[tuple[str, list[str], list[str]]]:
        for path, folders, files in walk(*words, **more):
            folders.sort(reverse=True)
            yield path, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", reversed_walk)
    assert listed(data) == expected == ["a/c.png", "b.png", "d/e.png", "d/z/f/g.png"]


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    put(tmp_path, "a.PNG", "b.JpEg", "c.png")
    (tmp_path / "a.TXT").write_text("a cat")
    (tmp_path / "b.txt").write_text("a dog")
    (tmp_path / "b.TXT").write_text("an older one")
    source = FolderSource(str(tmp_path))
    assert source.files == ["a.PNG", "b.JpEg", "c.png"]
    assert [source.caption(index) for index in (0, 1)] == ["a cat", "a dog"]
    assert not source.passed_over


def test_what_is_passed_over_is_said_once_with_its_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    put(tmp_path, "a.png", "a.txt", "b.HEIC", "c.heic", "c.txt", ".git/x", "README", "e.psd", "d.png")
    with caplog.at_level(logging.INFO):
        open_source(Source(type="folder", path=str(tmp_path)))
    assert caplog.messages == [
        f"folder {tmp_path}: 2 samples; passed over: 1 hidden folder, 1 other file, 1 unpaired .txt file, "
        "2 .heic files, 1 .psd file"
    ]


def test_a_folder_without_an_image_that_is_read_says_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path, "a.heic", "b.heic", *(f"c.{number}" for number in range(20)))
    words = (
        r"no samples; passed over: 2 \.heic files, 1 \.0 file, .*, 9 more\. Images are files named .*\.png"
    )
    with pytest.raises(DataError, match=words):
        open_source(Source(type="folder", path=str(tmp_path)))


def test_references_are_found_behind_links_and_unread_formats_counted(tmp_path: Path) -> None:
    put(tmp_path / "other", "c.webp")
    put(tmp_path / "before", "a.JPG", "a.txt", "d.heic", "unused.png", "unused.jpg")
    put(tmp_path / "before", "a.png/x", "e/x", "b.jpg/x")  # folders called as images are
    (tmp_path / "before/b").symlink_to(tmp_path / "other")
    passed_over: Counter[str] = Counter()
    found = images_named({"a", "b/c", "d", "e"}, str(tmp_path / "before"), passed_over)
    assert found == {"a": "a.JPG", "b/c": "b/c.webp"}
    assert passed_over == {".heic reference": 1}
