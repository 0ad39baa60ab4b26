"""Which folders count as checkpoints, and how damage to their files is found."""

import errno
import hashlib
import json
import logging
from itertools import chain

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


OTHERS = (
    "step-5.old-backup",
    "step-5.tmp-1",
    "step-8.gone-0123ABCD",
    "step-08.tmp-0123abcd",
    "step-6.damaged",
)


def test_tidy_removes_what_a_kill_left_and_nothing_else(tmp_path):
    make(tmp_path, 1)
    (commit.new_folder(tmp_path, 2) / "__0_0.distcp").write_bytes(b"part")
    make(tmp_path, 3).rename(tmp_path / "step-3.gone-0123abcd")
    # Killed between the two renames of a replacement:
    make(tmp_path, 4).rename(tmp_path / "step-4.old-0123abcd")
    make(tmp_path, 5).rename(tmp_path / "step-5.old-0123abcd")
    make(tmp_path, 5, b"newer")
    for name in OTHERS:
        make(tmp_path, 9).rename(tmp_path / name)
    files = ("notes.txt", "step-7", "step-10.old-0123abcd")
    for name in files:
        (tmp_path / name).write_text("mine")
    commit.tidy(tmp_path)
    assert names(tmp_path) == sorted([*files, *OTHERS, "step-1", "step-4", "step-5"])
    assert (tmp_path / "step-5" / STATE).read_bytes().startswith(b"newer")
    verify(tmp_path / "step-4")


def test_of_a_link_only_the_link_is_deleted(tmp_path, caplog):
    """A checkpoint that was moved to another disk, and linked back."""
    big, folder = tmp_path / "big", tmp_path / "run"
    big.mkdir()
    folder.mkdir()
    for step in (1, 2, 3):
        make(folder, step).rename(big / f"step-{step}")
        (folder / f"step-{step}").symlink_to(big / f"step-{step}")
    assert commit.whole_steps(folder) == [1, 2, 3]
    with caplog.at_level(logging.INFO, "flux_trainer"):
        commit.discard(folder, 1)
    assert f"step-1 was a link: it is deleted, and {big / 'step-1'} stays" in caplog.text
    make(folder, 2, b"newer")  # a run that went back
    (folder / "step-3").rename(folder / "step-3.gone-0123abcd")  # killed while it deleted
    (folder / "step-4.old-0123abcd").symlink_to(tmp_path / "unmounted")
    (folder / "step-4").symlink_to(tmp_path / "unmounted")
    commit.tidy(folder)
    assert names(folder) == ["step-2", "step-4"]
    assert not (folder / "step-2").is_symlink()
    for step in (1, 2, 3):
        verify(big / f"step-{step}")


def test_files_of_others_in_a_checkpoint_stay(tmp_path, caplog):
    path = make(tmp_path, 1)
    (path / "README.md").write_text("the good one")
    commit.discard(tmp_path, 1)
    commit.tidy(tmp_path)
    [left] = tmp_path.iterdir()
    assert names(left) == ["README.md"]
    assert f"{left} stays: it holds files that the trainer did not write (README.md)" in caplog.text


def test_what_is_left_of_a_replaced_checkpoint_is_none(tmp_path):
    (make(tmp_path, 1) / "README.md").write_text("the good one")
    make(tmp_path, 1)  # leaves the note, as step-1.old-...
    commit.discard(tmp_path, 1)
    commit.tidy(tmp_path)
    assert not (tmp_path / "step-1").exists()
    make(tmp_path, 1)


def test_what_cannot_be_deleted_stays_with_a_warning(tmp_path, caplog, monkeypatch):
    make(tmp_path, 1)
    (tmp_path / "step-2.gone-0123abcd").mkdir()

    def refuse(path, *_):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    for call in ("rmdir", "rename"):
        monkeypatch.setattr(commit.Path, call, refuse)
        commit.discard(tmp_path, 1)
        commit.tidy(tmp_path)
    assert f"{tmp_path}/step-2.gone-0123abcd could not be deleted" in caplog.text
    assert "busy" in caplog.text


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_checkpoint_is_never_replaced_by_one(tmp_path, kind):
    path = tmp_path / "step-1"
    if kind == "file":
        path.write_text("mine")
    elif kind == "link":
        path.symlink_to("unmounted")
    else:
        path.mkdir()
        (path / "__0_0.distcp").write_bytes(b"part of a copy")
    with pytest.raises(CheckpointError, match="step-1 is not a complete checkpoint and blocks"):
        make(tmp_path, 1)
    assert names(tmp_path) == ["step-1"]
    assert kind != "folder" or names(path) == ["__0_0.distcp"]


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
        commit.publish(path, 1, {"__3_0.distcp": {"size": 1, "sha256": [""]}})
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


CONTENT = bytes(range(20))


@pytest.mark.parametrize("piece", [1, 7, 16, 32, 33, 1000])
def test_damage_in_any_piece_of_one_file_among_many_is_named_once(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(commit, "PIECE", piece)
    path = make(tmp_path, 1, CONTENT)
    hashes = commit.read_manifest(path)["__0_0.distcp"]["sha256"]
    content = CONTENT + b"__0_0.distcp"
    parts = [content[start : start + piece] for start in range(0, len(content), piece)]
    assert hashes == [hashlib.sha256(part).hexdigest() for part in parts]
    verify(path)
    for position in range(len(content)):
        broken = bytearray(content)
        broken[position] ^= 1
        (path / "__0_0.distcp").write_bytes(broken)
        with pytest.raises(DamagedError, match=r"step-1 is damaged: __0_0\.distcp \(content changed\)\.$"):
            verify(path)
    (path / "__0_0.distcp").write_bytes(bytes(len(content)))  # damaged in every piece
    with pytest.raises(DamagedError, match=r"step-1 is damaged: __0_0\.distcp \(content changed\)\.$"):
        verify(path)


def test_empty_files_are_looked_at_too(tmp_path):
    path = commit.new_folder(tmp_path, 1)
    (path / STATE).touch()
    commit.publish(path, 1, commit.seal(path, "*"))
    path = commit.step_folder(tmp_path, 1)
    verify(path)
    (path / STATE).unlink()
    with pytest.raises(DamagedError, match=r"state\.json \(missing\)"):
        verify(path)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_ranks_share_the_pieces_evenly(tmp_path, monkeypatch, size):
    monkeypatch.setattr(commit, "PIECE", 7)
    files = commit.read_manifest(make(tmp_path, 1, CONTENT))
    shares = [commit.pieces(files, rank, size) for rank in range(size)]
    assert list(chain.from_iterable(shares)) == commit.pieces(files, 0, 1)
    assert sum(map(len, shares)) == sum(-(-record["size"] // 7) for record in files.values())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_errors_of_hashing_reach_the_caller(tmp_path, monkeypatch):
    """A bad sector is damage; what is no fault of the file is raised, and nobody renames the checkpoint."""
    monkeypatch.setattr(commit, "PIECE", 7)
    path = make(tmp_path, 1, CONTENT)
    number, sha256 = errno.EIO, commit.sha256

    def failing(file, start, size):
        if file.name == "__0_0.distcp" and start == 14:
            raise OSError(number, "cannot read this", str(file))
        return sha256(file, start, size)

    monkeypatch.setattr(commit, "sha256", failing)
    with pytest.raises(DamagedError, match=r"step-1 is damaged: __0_0\.distcp \(unreadable\)\.$"):
        verify(path)
    number = errno.EACCES
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: cannot read this") as caught:
        verify(path)
    assert not isinstance(caught.value, DamagedError)


def test_checkpoints_of_version_1_have_one_hash_of_each_file(tmp_path, monkeypatch):
    path = make(tmp_path, 1, CONTENT)
    files = {
        name: {"size": record["size"], "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name, record in commit.read_manifest(path).items()
    }
    with monkeypatch.context() as then:
        then.setattr(commit, "VERSION", 1)
        commit.write_manifest(path, 1, files)
    monkeypatch.setattr(commit, "PIECE", 7)
    verify(path)
    content = (path / "__0_0.distcp").read_bytes()
    (path / "__0_0.distcp").write_bytes(content[:-1] + b"!")
    with pytest.raises(DamagedError, match=r"__0_0\.distcp \(content changed\)"):
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
        CheckpointError, match="has version 2 of the checkpoint format; this trainer reads 0"
    ) as caught:
        verify(path)
    assert not isinstance(caught.value, DamagedError)  # nobody must rename it


def test_the_manifest_is_plain_json_with_sizes_and_hashes(tmp_path):
    manifest = json.loads((make(tmp_path, 7) / commit.MANIFEST).read_text())
    assert manifest["version"] == 2
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {METADATA, STATE, "__0_0.distcp"}
    assert manifest["files"][STATE]["size"] == 10 + len(STATE)
    assert [len(text) for text in manifest["files"][STATE]["sha256"]] == [64]


def test_set_aside_never_overwrites(tmp_path):
    make(tmp_path, 1)
    assert commit.set_aside(tmp_path, 1).name == "step-1.damaged"
    make(tmp_path, 1)
    second = commit.set_aside(tmp_path, 1).name
    assert names(tmp_path) == sorted(["step-1.damaged", second])


def test_set_aside_of_a_link_leaves_what_it_points_to(tmp_path):
    make(tmp_path, 1).rename(tmp_path / "big")
    (tmp_path / "step-1").symlink_to(tmp_path / "big")
    (tmp_path / "step-1.damaged").symlink_to("unmounted")
    aside = commit.set_aside(tmp_path, 1)
    assert aside.is_symlink()
    assert aside.name.startswith("step-1.damaged-")
    assert (tmp_path / "step-1.damaged").is_symlink()
    verify(tmp_path / "big")
