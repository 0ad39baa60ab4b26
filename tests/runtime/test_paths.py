"""What is in the way of a folder, in words, and nothing made in finding out."""

import os

import pytest

from flux_trainer.runtime import paths


@pytest.mark.parametrize("name", ["there", "new", "new/deep/er", "linked", "linked/new", "there/../new"])
def test_folders_that_can_be_made(tmp_path, name):
    (tmp_path / "there").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "there")
    before = sorted(tmp_path.rglob("*"))
    assert paths.folder_problem(tmp_path / name) is None
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("file", "{}/file is a file; name a folder"),
        ("file/x/y", "{}/file is a file; name a folder"),
        ("to_file", "{}/to_file is a file; name a folder"),
        ("away", "{0}/away is a link to {0}/disk, which is not there; mount its disk, or name a folder"),
        ("away/x/y", "{0}/away is a link to {0}/disk, which is not there; mount its disk, or name a folder"),
        ("loop", "{}/loop cannot be reached (Too many levels of symbolic links); name another folder"),
        ("n" * 300, "{}/" + "n" * 300 + " cannot be reached (File name too long); name another folder"),
        ("a\0b", "{}/a\0b cannot be reached (embedded null byte); name another folder"),
    ],
)
def test_folders_that_cannot(tmp_path, name, problem):
    (tmp_path / "file").touch()
    (tmp_path / "to_file").symlink_to(tmp_path / "file")
    (tmp_path / "away").symlink_to(tmp_path / "disk")
    (tmp_path / "loop").symlink_to("loop")
    assert paths.folder_problem(tmp_path / name) == problem.format(tmp_path)


def test_folders_that_may_not_be_written_to(tmp_path, monkeypatch):
    """As on a disk of another user's; permissions do not bind who may be root."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    sentence = f"{tmp_path} is not writable (permission denied); name another folder"
    assert paths.folder_problem(tmp_path / "new") == sentence


def test_a_disk_that_is_read_only(tmp_path, monkeypatch):
    flags = os.statvfs(tmp_path).f_flag | os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: type("", (), {"f_flag": flags}))
    assert paths.folder_problem(tmp_path) == (
        f"{tmp_path} lies on a file system that is read-only; name another folder"
    )
