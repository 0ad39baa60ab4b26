"""The launcher: what it says last when a rank fails, its exit status, and which signals it obeys."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flux_trainer import launch
from flux_trainer.runtime import launcher
from flux_trainer.runtime.log import logger


@pytest.fixture
def failure(tmp_path, monkeypatch):
    """Makes the failure of a rank as torchrun sees it: with what it has left, if anything."""
    made = []

    def fail(exitcode=1, sentence="", second_hand=False, seconds=0):
        file = tmp_path / f"error-{len(made)}.json"
        made.append(file)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if sentence:
            launcher.tell(sentence, second_hand=second_hand)
            content = json.loads(file.read_text())
            content["message"]["extraInfo"]["timestamp"] = str(1000 + seconds)
            file.write_text(json.dumps(content))
        failed = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file=str(file))
        if not sentence:
            failed.timestamp = 1000 + seconds
        return failed

    return fail


def last_word(*failures):
    return launch.last_word(*launch.first_failure(dict(enumerate(failures))))


def test_a_rank_s_own_error_counts_more_than_what_follows_from_it(failure):
    gone = "Rank 2 (dp_shard 2; machine a) failed: No key."
    own = failure(1, "No key.", seconds=2)
    told = failure(1, gone, second_hand=True, seconds=1)
    ended = failure(-signal.SIGTERM, seconds=0)  # by the launcher
    assert last_word(ended, told, own) == "Rank 2 failed: No key."
    assert last_word(ended, told) == gone
    assert last_word(failure(-signal.SIGKILL), told) == gone
    assert last_word(failure(1, "First."), failure(1, "Second.", seconds=1)) == "Rank 0 failed: First."


def test_ranks_without_a_word(failure):
    killed = failure(-signal.SIGKILL, seconds=1)
    assert last_word(failure(-signal.SIGTERM), killed) == (
        "Rank 1 was killed by SIGKILL. Is the machine short of memory?"
    )
    assert last_word(failure(-signal.SIGSEGV)) == "Rank 0 was killed by SIGSEGV."
    assert last_word(failure(3)) == "Rank 0 ended with exit status 3."


@pytest.fixture
def said(monkeypatch, caplog):
    """Lines of the log, which `init_logger` would send elsewhere."""
    monkeypatch.setattr(launch, "init_logger", lambda: None)
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "flux_trainer")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("exitcode", "sentence", "ranks", "status", "lines"),
    [
        (2, "No key.", 2, 2, ["Rank 0 failed: No key."]),
        (1, "No key.", 1, 1, []),  # a rank alone has said it in this terminal
        (-9, "", 1, 137, ["Rank 0 was killed by SIGKILL. Is the machine short of memory?"]),
    ],
)
def test_the_exit_status_is_the_rank_s(failure, said, monkeypatch, exitcode, sentence, ranks, status, lines):
    def fail(args):
        raise ChildFailedError("train", {0: failure(exitcode, sentence)})

    monkeypatch.setattr(run, "run", fail)
    assert launch.main(["--nproc-per-node", str(ranks), "-m", "flux_trainer.train"]) == status
    assert said() == lines


@pytest.mark.parametrize("nohup", [False, True])
def test_signals(said, monkeypatch, nohup):
    def stop(args):
        handled.append(args.signals_to_handle)
        raise SignalException("stop", signal.SIGTERM)

    handled: list[str] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    monkeypatch.setattr(run, "run", stop)
    try:
        assert launch.main(["a.py"]) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)
    assert handled == ["SIGTERM,SIGINT,SIGQUIT" if nohup else "SIGTERM,SIGINT,SIGHUP,SIGQUIT"]
    assert said() == []


def test_ctrl_c_before_there_are_ranks(said, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupt)
    assert launch.main(["a.py"]) == 130
    assert said() == ["Interrupted."]


RANK = """
import os, sys, time
from flux_trainer.runtime import launcher
if os.environ["RANK"] == "1":
    launcher.tell("No key.\\nGet one.")
    sys.exit(3)
time.sleep(60)
"""


@pytest.mark.distributed
def test_no_traceback_of_the_launcher_follows(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    words = ["-m", "flux_trainer.launch", "--standalone", "--nproc-per-node=2", str(tmp_path / "rank.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith(" ERROR    Rank 1 failed: No key.\nGet one.\n")
