"""Which folders count as checkpoints, and how damage to their files is found."""

import json
import logging

import pytest

from flux_trainer.checkpoint import commit
from flux_trainer.checkpoint.errors import CheckpointError, DamagedError
from flux_trainer.checkpoint.load import STATE, verify
from flux_trainer.checkpoint.metadata import METADATA


def make(folder, step, content=b"0123456789"):
    path = commit.new_folder(folder, step)
    for name in (METADATA, STATE, "__0_0.distcp"):
        (path / name).write_bytes(content + name.encode())
    commit.publish(path, step, commit.seal(path, "*") | commit.seal(path, ".*"))
    return commit.step_folder(folder, step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_published_folders_count_in_number_order(tmp_path):
    for step in (10, 9, 100):
        make(tmp_path, step)
    (tmp_path / "step-11").mkdir()  # no manifest: not one of ours, or copied in part
    commit.new_folder(tmp_path, 12)
    (tmp_path / "step-13.damaged").mkdir()
    assert commit.whole_steps(tmp_path) == [9, 10, 100]
    assert commit.whole_steps(tmp_path / "absent") == []


def test_tidy_removes_what_a_kill_left_and_nothing_else(tmp_path):
    make(tmp_path, 1)
    (commit.new_folder(tmp_path, 2) / "__0_0.distcp").write_bytes(b"part")
    make(tmp_path, 3).rename(tmp_path / "step-3.gone-00aa")
    make(tmp_path, 4).rename(tmp_path / "step-4.old-00aa")  # killed between the two renames of a replacement
    make(tmp_path, 5).rename(tmp_path / "step-5.old-00aa")
    make(tmp_path, 5, b"newer")
    (tmp_path / "step-6.damaged").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    commit.tidy(tmp_path)
    assert names(tmp_path) == ["notes.txt", "step-1", "step-4", "step-5", "step-6.damaged"]
    assert (tmp_path / "step-5" / STATE).read_bytes().startswith(b"newer")
    verify(tmp_path / "step-4")


def test_a_step_can_be_written_again(tmp_path):
    make(tmp_path, 1)
    make(tmp_path, 1, b"newer")
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / STATE).read_bytes().startswith(b"newer")


def test_files_that_only_another_machine_sees_are_noticed(tmp_path):
    path = commit.new_folder(tmp_path, 1)
    with pytest.raises(
        CheckpointError, match=r"__3_0\.distcp was written by another rank .* all ranks share"
    ):
        commit.publish(path, 1, {"__3_0.distcp": {"size": 1, "sha256": ""}})
    assert commit.whole_steps(tmp_path) == []


@pytest.mark.parametrize("name", [METADATA, STATE, "__0_0.distcp", commit.MANIFEST])
def test_one_flipped_bit_anywhere_is_found(tmp_path, name):
    path = make(tmp_path, 1)
    content = (path / name).read_bytes()
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 1
        (path / name).write_bytes(broken)
        if name == commit.MANIFEST and content[position : position + 1].isspace():
            continue  # space between JSON's words says nothing
        with pytest.raises(DamagedError, match=rf"step-1 is damaged: {name} \(content changed\)\."):
            verify(path)
    (path / name).write_bytes(content)
    verify(path)


def test_all_damage_is_named(tmp_path):
    path = make(tmp_path, 1)
    (path / STATE).unlink()
    (path / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(DamagedError) as caught:
        verify(path)
    assert "__0_0.distcp (5 bytes, 22 were written), state.json (missing)" in str(caught.value)


def test_foreign_files_are_only_warned_of(tmp_path, caplog):
    path = make(tmp_path, 1)
    (path / "README.md").write_text("the good one")
    with caplog.at_level(logging.WARNING, "flux_trainer"):
        verify(path)
    assert "did not write: README.md" in caplog.text


def test_a_folder_of_something_else_and_of_a_later_release_say_so(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"is no checkpoint of this trainer: it has no manifest\.json"):
        verify(tmp_path)
    path = make(tmp_path, 1)
    monkeypatch.setattr(commit, "VERSION", 0)
    with pytest.raises(
        CheckpointError, match="has version 1 of the checkpoint format; this trainer reads 0"
    ) as caught:
        verify(path)
    assert not isinstance(caught.value, DamagedError)  # nobody must rename it


def test_the_manifest_is_plain_json_with_sizes_and_hashes(tmp_path):
    manifest = json.loads((make(tmp_path, 7) / commit.MANIFEST).read_text())
    assert manifest["version"] == 1
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {METADATA, STATE, "__0_0.distcp"}
    assert manifest["files"][STATE]["size"] == 10 + len(STATE)
    assert len(manifest["files"][STATE]["sha256"]) == 64


def test_set_aside_never_overwrites(tmp_path):
    make(tmp_path, 1)
    assert commit.set_aside(tmp_path, 1).name == "step-1.damaged"
    make(tmp_path, 1)
    second = commit.set_aside(tmp_path, 1).name
    assert names(tmp_path) == sorted(["step-1.damaged", second])
