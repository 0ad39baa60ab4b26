"""One run at a time in a folder."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from flux_trainer.runtime.lock import NAME, FolderInUse, exclusive

HOLD = """
import sys, time
from flux_trainer.runtime.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder `run`, which it has made."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_holder_is_named_until_it_dies(tmp_path, holder):
    sentence = rf"/run is in use by process {holder.pid} on {socket.gethostname()} since \d{{4}}-"
    for _ in range(2):
        with pytest.raises(FolderInUse, match=sentence), exclusive(tmp_path / "run"):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with exclusive(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / NAME).read_text()


def test_a_holder_without_a_name(tmp_path, holder):
    (tmp_path / "run" / NAME).write_text("")
    with pytest.raises(FolderInUse, match="in use by another process"), exclusive(tmp_path / "run"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with exclusive(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available): do not start a second run in it" in caplog.text
