"""The list of bad samples and the share at which a run stops."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
from dataclasses import asdict
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from flux_trainer.data.bad import BadRecord, BadSamples, DataError

RECORDS = [BadRecord("folder x", i, "no caption") for i in range(5)]


def listed(folder: Path) -> list[BadRecord]:
    return [BadRecord(**json.loads(line)) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_every_bad_sample_is_listed_once(tmp_path: Path) -> None:
    first, second = BadSamples(tmp_path / "dump"), BadSamples(tmp_path / "dump")  # two ranks
    first.count(8, 2, [RECORDS[0], RECORDS[1], RECORDS[0]])
    first.count(8, 1, [RECORDS[1]])
    second.count(8, 2, [RECORDS[1], RECORDS[2]])
    BadSamples(tmp_path / "dump").list(RECORDS[:3])  # after a resume
    assert listed(tmp_path / "dump") == RECORDS[:3]
    assert (first.draws, first.bad_draws) == (16, 3)
    assert (second.draws, second.bad_draws) == (8, 2)


def test_good_batches_write_nothing(tmp_path: Path) -> None:
    BadSamples(tmp_path / "dump").count(8, 0, [])
    assert not (tmp_path / "dump").exists()


def test_a_torn_line_is_no_obstacle(tmp_path: Path) -> None:
    BadSamples(tmp_path).list(RECORDS[:1])
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        file.write('{"source": "fol')
    BadSamples(tmp_path).list(RECORDS[:1])
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 2


def _list(folder: Path, begin: Event) -> None:
    begin.wait()
    BadSamples(folder).list(RECORDS[:2])


def test_a_rank_waits_while_another_one_writes(tmp_path: Path) -> None:
    begin = multiprocessing.Event()
    other = multiprocessing.Process(target=_list, args=(tmp_path, begin))
    other.start()
    with (tmp_path / "bad_samples.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin.set()
        other.join(timeout=0.5)
        assert other.is_alive()
        file.write(json.dumps(asdict(RECORDS[0])) + "\n")
    other.join(timeout=60)
    assert listed(tmp_path) == RECORDS[:2]


def test_the_run_stops_above_the_share(tmp_path: Path) -> None:
    bad = BadSamples(tmp_path)
    bad.list(RECORDS[:1])
    for bad_draws, draws in ((0, 0), (5, 8), (5, 100), (50, 1000)):
        bad.raise_if_too_many(bad_draws, draws, 0.05)
    for bad_draws, draws in ((6, 8), (6, 100), (51, 1000)):
        with pytest.raises(DataError, match=f"{bad_draws} of {draws} samples were bad") as caught:
            bad.raise_if_too_many(bad_draws, draws, 0.05)
        assert "folder x, sample 0: no caption" in str(caught.value)
        assert str(tmp_path / "bad_samples.jsonl") in str(caught.value)
    with pytest.raises(DataError):
        bad.raise_if_too_many(1, 10**6, 0.0)
    bad.raise_if_too_many(100, 100, 1.0)
