"""Atomic writes, hashes and the space check of runtime/files.py."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from flux_trainer.runtime import files


def test_write_text_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "note.txt"
    files.write_text(path, "first")
    files.write_text(path, "zweitens: ä")
    assert path.read_text(encoding="utf-8") == "zweitens: ä"
    assert os.listdir(path.parent) == ["note.txt"]


def test_a_reader_meets_the_old_content_or_the_new(tmp_path):
    path = tmp_path / "note.txt"
    files.write_text(path, "old and long")
    with open(path) as reader:
        files.write_text(path, "new")
        assert reader.read() == "old and long"


def test_write_json_keeps_every_bit_of_a_float(tmp_path):
    value = {"loss": 0.1 + 0.2, "steps": [1, 2], "none": None}
    files.write_json(tmp_path / "state.json", value)
    assert json.loads((tmp_path / "state.json").read_text()) == value


def _write_too_much(path: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    files.write_text(path, "x" * 2000)


def test_a_failed_write_keeps_the_old_content(tmp_path):
    from helpers.ranks import start

    path = tmp_path / "note.txt"
    files.write_text(path, "old")
    process = start(_write_too_much, str(path))
    process.join(60)
    assert process.exitcode == 1
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note.txt"]


@pytest.mark.parametrize("size", [0, 1, 100_001, files._CHUNK + 7])
def test_sha256_is_that_of_the_whole_content(tmp_path, size):
    content = bytes(i % 251 for i in range(size % 1000)) * max(1, size // 1000)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("start", "size"), [(0, 5), (3, files._CHUNK + 3), (7, 2**40), (2**40, 1), (4, 0)])
def test_sha256_of_a_piece(tmp_path, start, size):
    content = bytes(i % 251 for i in range(1000)) * (files._CHUNK // 500)
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file", start, size) == hashlib.sha256(content[start:][:size]).hexdigest()


def test_ensure_space_says_how_much_is_missing(tmp_path):
    files.ensure_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"needs 1e\+09 GB and its disk has .* left\. Make room") as caught:
        files.ensure_space(tmp_path, 10**18)
    assert caught.value.errno == errno.ENOSPC


def test_files_and_log_import_no_torch():
    code = (
        "import sys, flux_trainer.runtime.files, flux_trainer.runtime.log as l; exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
