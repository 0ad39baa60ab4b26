"""The list of bad samples and the share at which a run stops."""

from __future__ import annotations

import json
import multiprocessing
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


def _list_all(folder: Path) -> None:
    for record in RECORDS * 3:
        BadSamples(folder).list([record])


def test_processes_do_not_write_over_each_other(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_list_all, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(listed(tmp_path), key=lambda record: record.index) == RECORDS


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
