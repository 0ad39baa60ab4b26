"""The ring of watchers: a dead rank is named to all, a hung one is killed, an orderly end is no death."""

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from flux_trainer.runtime import peers
from flux_trainer.runtime.watcher import GRACE

pytestmark = pytest.mark.distributed


def enter(folder: Path):
    """A world whose ranks write standard error to files, and know their places."""
    from flux_trainer.runtime.dist import init_distributed

    with (folder / f"words{os.environ['RANK']}").open("w") as words:
        os.dup2(words.fileno(), 2)
    world = init_distributed(30)
    peers.introduce(f"place {world.rank}")
    world.sum([1.0])  # all are here
    return world


def words(folder: Path, rank: int) -> str:
    return (folder / f"words{rank}").read_text()


def named(sentences: str) -> set[int]:
    """The ranks that are said to be gone."""
    return {int(number) for number in re.findall(r"Rank (\d+) \(place \1; machine", sentences)}


def hang_with_the_interpreter() -> None:
    """In a call that lets no other thread of Python run."""
    while True:  # a signal ends one sleep
        ctypes.PyDLL(None).sleep(60)


def survive(folder: Path, dying: tuple[int, ...]) -> tuple[float, str | None]:
    """Seconds until a rank knows who was killed, and what it is told."""
    world = enter(folder)
    if world.rank in dying:
        time.sleep(0.2)  # the others wait for a message by now
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    who = peers.lost()
    time.sleep(0.5)
    return time.monotonic() - began, who


@pytest.mark.parametrize(("ranks", "dying"), [(2, (0,)), (4, (2,)), (4, (1, 2))])
def test_everybody_learns_who_was_killed(tmp_path, ranks, dying):
    results = run_ranks(ranks, survive, tmp_path, dying, lost=dying)
    for rank in set(range(ranks)) - set(dying):
        seconds, who = results[rank]
        assert seconds < 2
        assert named(who) & set(dying)
        assert named(who) <= set(dying), "nobody else is blamed"
        assert words(tmp_path, rank) == "", "the rank itself says who is gone"
    # Of two that die within the same moment, one may pass for a consequence of the other.
    told = {rank for rank in dying if named(words(tmp_path, rank)) == {rank}}
    assert told


def hang(folder: Path, how: str) -> None:
    world = enter(folder)
    if world.rank == 1:
        (folder / "end").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if how == "loop":
        while True:
            time.sleep(0.01)
    hang_with_the_interpreter()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loop", "call"])
def test_a_rank_that_does_not_notice_is_killed_and_its_watcher_speaks_for_it(tmp_path, how):
    run_ranks(2, hang, tmp_path, how, lost={0, 1})
    assert GRACE < time.time() - (tmp_path / "end").stat().st_mtime < GRACE + 2
    said = words(tmp_path, 0)
    assert re.search(r"Rank 1 \(place 1; machine .*\) is gone: .* This one has not noticed in 3 s", said)
    assert named(said) == {1}


def wait_in_vain(folder: Path) -> tuple[float, str | None]:
    world = enter(folder)
    if world.rank == 1:
        hang_with_the_interpreter()
    began = time.monotonic()
    return time.monotonic() - began, peers.lost()


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_and_killed(tmp_path):
    results = run_ranks(3, wait_in_vain, tmp_path, lost={1})
    for rank in (0, 2):
        assert re.match(r"Rank 1 \(place 1; machine .*\) stands still: ", results[rank][1])
        assert named(results[rank][1]) == {1}


def wait_with_marks(folder: Path, hanging: int) -> str | None:
    """Rank 0 waits; of the others, which notice nothing, those from `hanging` on lack its last mark."""
    world = enter(folder)
    peers.mark(4)
    if world.rank < hanging:
        peers.mark()
    if world.rank:
        hang_with_the_interpreter()
    time.sleep(0.2)
    return peers.lost()


@pytest.mark.slow
def test_of_the_ranks_that_do_not_notice_the_one_furthest_behind_is_named(tmp_path):
    who = run_ranks(3, wait_with_marks, tmp_path, 2, lost={1, 2})[0]
    assert re.match(r"Rank 2 \(place 2; machine .*\) stands still: .* in step 4; asleep, ", who)
    assert named(who) == {2}
    assert "This one has not noticed in 3 s" in words(tmp_path, 1)
    assert "It is killed" in words(tmp_path, 2)


@pytest.mark.slow
def test_ranks_that_are_equally_far_are_all_named_as_possible(tmp_path):
    who = run_ranks(3, wait_with_marks, tmp_path, 1, lost={1, 2})[0]
    assert who.startswith("One of 2 ranks holds up all others; they are equally far (in step 4)")
    assert named(who) == {1, 2}


def fail(folder: Path) -> str | None:
    world = enter(folder)
    if world.rank == 1:
        peers.failed("out of ideas")
        time.sleep(1)
        return None
    return peers.lost()


def test_the_failure_of_a_rank_is_told_with_its_reason(tmp_path):
    for who in run_ranks(3, fail, tmp_path, lost={1})[::2]:
        assert re.fullmatch(r"Rank 1 \(place 1; machine .*\) failed: out of ideas", who)


def lose_a_machine(folder: Path) -> str | None:
    """Rank 1 and its watcher fall silent together."""
    world = enter(folder)
    time.sleep(0.3)  # the watchers have made acquaintance
    if world.rank == 1:
        peers._process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    return peers.lost()


def test_a_lost_machine_is_noticed_by_its_neighbours(tmp_path):
    for who in run_ranks(4, lose_a_machine, tmp_path, lost={1})[::2]:
        assert re.match(r"Rank 1 \(place 1; machine .*\) is gone: its machine does not answer", who)


def leave_one_after_another(folder: Path) -> tuple[int, list]:
    """The exit status of the watcher, and what it had to say."""
    world = enter(folder)
    watcher = peers._process
    time.sleep(0.4 * world.rank)
    told = select.select([peers._line.connection], [], [], 0)[0]
    peers.leave()
    peers.leave()
    return watcher.returncode, told


def test_an_orderly_end_is_no_death(tmp_path):
    assert run_ranks(3, leave_one_after_another, tmp_path) == [(0, []), (0, []), (0, [])]
    for rank in range(3):
        assert words(tmp_path, rank) == ""


def test_the_first_ranks_machine_is_known_by_the_name_that_all_have(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert peers._own_host() == "localhost"
    monkeypatch.delenv("MASTER_ADDR")
    assert peers._own_host() == "127.0.0.1"


SCRIPT = """
import ctypes, os, pathlib, signal, sys
from flux_trainer.runtime import peers
from flux_trainer.runtime.dist import init_distributed
from flux_trainer.runtime.signals import StopFlag

world = init_distributed(30)
peers.introduce(f"place {world.rank}")
world.sum([1.0])
with StopFlag(world):
    if world.rank == 1:
        pathlib.Path(sys.argv[1]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while True:  # a signal ends one sleep
        ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.slow
def test_under_torchrun_a_dead_rank_ends_the_job_though_others_hang_and_heed_no_signal(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(script), str(tmp_path / "end")]
    environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert time.time() - (tmp_path / "end").stat().st_mtime < 10
    assert run.returncode != 0
    assert named(run.stderr) == {1}
    assert run.stderr.count("This one has not noticed") == 2, run.stderr
