"""Two runs in one folder: the second is refused before it costs anything."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_run import ROOT

from flux_trainer import train

HOLD = """
import sys
from flux_trainer.runtime.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def started(monkeypatch):
    """The runs that have begun."""
    runs = []
    monkeypatch.setattr(train, "train", lambda config: runs.append(config) or 0)
    monkeypatch.setattr(train, "init_logger", lambda *_, **__: None)
    monkeypatch.chdir(ROOT)
    return runs


@pytest.mark.parametrize("shared", ["job.dump_folder", "checkpoint.folder"])
def test_the_second_run_is_refused_and_the_first_is_named(shared, started, tmp_path, monkeypatch, capsys):
    folders = {"job.dump_folder": tmp_path / "run", "checkpoint.folder": tmp_path / "big"}
    words = [f"--{key}={folder}" for key, folder in folders.items()]
    monkeypatch.setattr(
        sys,
        "argv",
        ["train", "--job.config_file=train_configs/emoji_tiny.toml", "--checkpoint.enable", *words],
    )
    hold = [sys.executable, "-c", HOLD, str(folders[shared])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        hold, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        assert train.main() == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"{shared}: {folders[shared]} is in use by process {first.pid} on {socket.gethostname()} since "
        )
        assert said.endswith("; wait for its end, stop it with SIGTERM, or choose another folder\n")
        assert started == []
        monkeypatch.setenv("RANK", "1")
        assert train.main() == 0, "the first rank speaks for all"
        monkeypatch.delenv("RANK")
        first.stdin.close()
    assert train.main() == 0
    assert len(started) == 2


def test_a_folder_that_turns_out_unusable_is_named_by_its_setting(started, tmp_path, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise OSError(errno.EDQUOT, "Disk quota exceeded", str(path))

    folder = tmp_path / "run"
    words = ["train", "--job.config_file=train_configs/emoji_tiny.toml", f"--job.dump_folder={folder}"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train.main() == 2
    said = f"job.dump_folder cannot be used: {folder}: Disk quota exceeded; name another folder\n"
    assert capsys.readouterr().err == said
    assert started == []
