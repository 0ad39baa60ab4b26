"""Marks of progress in shared memory, and what /proc tells of a process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flux_trainer.runtime.progress import Look, Progress


def test_marks_are_read_by_another_process():
    progress = Progress.create()
    progress.mark(3)
    progress.mark()
    progress.mark()
    progress.patience = 7.5
    read = (
        "from flux_trainer.runtime.progress import Progress; "
        f"p = Progress({progress.fd}); print(p.place, p.patience, 0 <= p.idle < 60)"
    )
    command = [sys.executable, "-c", read]
    answer = subprocess.run(command, pass_fds=[progress.fd], capture_output=True, text=True, check=True)
    assert answer.stdout == "(3, 2) 7.5 True\n"
    progress.mark(4)
    assert progress.place == (4, 0)
    os.close(progress.fd)
    progress.mark()
    assert progress.place == (4, 1), "the memory outlives the descriptor"


def test_memory_that_is_no_memfd_serves_as_well(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    progress = Progress.create()
    other = Progress(progress.fd)
    progress.mark(2)
    assert other.place == (2, 0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
@pytest.mark.parametrize(
    ("program", "number", "activity"),
    [
        ("import time; time.sleep(60)", 0, "asleep"),
        ("while True: pass", 0, "busy"),
        ("while True: pass", signal.SIGSTOP, "stopped"),
    ],
)
def test_what_a_process_does(program, number, activity):
    command = [sys.executable, "-S", "-c", f"print(flush=True)\n{program}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        process.send_signal(number)
        time.sleep(0.1)
        before = Look.at(process.pid)
        for _ in range(20):  # a busy machine may keep a busy process waiting
            time.sleep(0.3)
            if (found := before.until(after := Look.at(process.pid))) == activity:
                break
            before = after
        assert found == activity
    finally:
        process.kill()
        process.wait()


def test_without_proc_nothing_is_known():
    nobody = Look.at(2**22 + 1)
    assert nobody.until(Look.at(os.getpid())) == ""
