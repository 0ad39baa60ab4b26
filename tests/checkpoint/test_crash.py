"""A save that is killed or runs out of disk leaves the checkpoints before it whole."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import start

from flux_trainer.checkpoint.commit import whole_steps
from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.checkpoint.load import verify
from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.schema import Checkpoint

ALONE = SimpleNamespace(rank=0, checkpoint=None)
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def tensors(step: int, size: int = 100) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size,), float(step)), "ema.weight": torch.full((size,), step + 0.5)}


def make(folder: str | Path, **settings) -> CheckpointManager:
    return CheckpointManager(Checkpoint(enable=True, keep_latest_k=2, **settings), folder, ALONE)


def resumed_step(folder: Path, size: int = 100) -> int:
    """What a new run finds: checks that it is whole and that nothing else is left; returns its step."""
    manager = make(folder)
    got = tensors(0, size)
    step = manager.resume(got, {})["step"]
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors(step, size).items())
    for path in manager.folder.iterdir():
        assert path.name.partition("-")[2].isdigit(), path
        verify(path)
    return step


def save_and_die(folder: str, step: int, event: int) -> None:
    """Save `step`, and be killed just before the `event`th change of the file system."""
    manager = make(folder)
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in _EVENTS and folder in str(arguments[0]):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    manager.save(step, tensors(step), {"step": step})


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 2], ids=["new", "again"])
def test_killed_at_any_moment(tmp_path, step):
    """Before each single opening, renaming and removal of a file or folder; also while a step is replaced."""
    before = make(tmp_path / "before")
    for earlier in (1, 2):
        before.save(earlier, tensors(earlier), {"step": earlier})
    outcomes, event, exitcode = [], 0, -9
    while exitcode == -9:
        event += 1
        folder = tmp_path / f"killed-{event}"
        shutil.copytree(tmp_path / "before", folder)
        process = start(save_and_die, str(folder), step, event)
        process.join(60)
        exitcode = process.exitcode
        outcomes.append(resumed_step(folder))
    assert exitcode == 0  # the last round met no more events and ran to its end
    assert event > 15
    assert outcomes == sorted(outcomes)  # the old one up to some moment, then the new one
    assert outcomes[0] == 2
    assert outcomes[-1] == step


def save_without_end(folder: str, size: int, mode: str) -> None:
    manager = make(folder, async_mode=mode)
    for step in range(1, 10_000):
        manager.save(step, tensors(step, size), {"step": step})


@pytest.mark.parametrize("mode", [*slow("disabled"), "async"])
def test_killed_at_random_moments(tmp_path, mode):
    rng = random.Random(0)
    size = 500_000
    for round_ in range(8):
        folder = tmp_path / str(round_)
        process = start(save_without_end, str(folder), size, mode)
        deadline = time.monotonic() + 60
        while whole_steps(folder / "checkpoint")[-1:] < [1 + round_ % 3] and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        assert resumed_step(folder, size) >= 1 + round_ % 3
        shutil.rmtree(folder)


def test_everything_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """At the moment of the last rename, each file had been synced at its final size, and then the folder."""
    synced: list[tuple[int, int]] = []
    fsync, rename = os.fsync, Path.rename

    def watch_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    def watch_rename(path, target):
        if Path(target).name == "step-1":
            for file in path.iterdir():
                assert (file.stat().st_ino, file.stat().st_size) in synced, file.name
            assert synced[-1][0] == path.stat().st_ino
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "rename", watch_rename)
    manager = make(tmp_path)
    manager.save(1, tensors(1), {"step": 1})
    assert synced[-1][0] == manager.folder.stat().st_ino
    assert manager.latest() == 1


def save_with_little_disk(folder: str, limit: int, report: str) -> None:
    """Save while no file may grow past `limit` bytes, and note the error."""
    manager = make(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail with EFBIG, as they do with ENOSPC
    try:
        manager.save(2, tensors(2, 500_000), {"step": 2})
    except CheckpointError as error:
        Path(report).write_text(str(error))


@pytest.mark.parametrize("limit", [10_000, 1_000_000, 3_000_000])
def test_a_write_that_fails_leaves_the_last_one_and_no_rest(tmp_path, limit):
    manager = make(tmp_path)
    manager.save(1, tensors(1, 500_000), {"step": 1})
    process = start(save_with_little_disk, str(tmp_path), limit, str(tmp_path / "report"))
    process.join(60)
    assert "File too large" in (tmp_path / "report").read_text()
    assert [path.name for path in manager.folder.iterdir()] == ["step-1"]
    assert resumed_step(tmp_path, 500_000) == 1


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    manager = make(tmp_path)
    manager.save(1, tensors(1), {"step": 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=500))
    with pytest.raises(CheckpointError, match=r"needs .* GB and its disk has 5e-07 GB left\. Make room"):
        manager.save(2, tensors(2), {"step": 2})
    assert resumed_step(tmp_path) == 1


def save_and_wait(manager: CheckpointManager) -> None:
    manager.save(2, tensors(2, 500_000), {"step": 2})
    manager.wait()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False, capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a small disk needs rights that this user lacks")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_disk_that_really_fills_up(small_disk, monkeypatch, announced, mode):
    manager = make(small_disk, async_mode=mode)
    manager.save(1, tensors(1, 500_000), {"step": 1})  # 4 MB of 6
    manager.wait()
    if not announced:  # as when another program takes the room during the save
        monkeypatch.setattr("flux_trainer.checkpoint.manager.ensure_space", lambda folder, needed: None)
    with pytest.raises(CheckpointError, match="Make room" if announced else "No space left on device"):
        save_and_wait(manager)
    assert [path.name for path in manager.folder.iterdir()] == ["step-1"]
    assert resumed_step(small_disk, 500_000) == 1
