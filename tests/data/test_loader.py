"""Every rank gets its part of the same global batches, for any number of ranks and workers, and any start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from flux_trainer.config.schema import Data, Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.loader import TrainLoader, ValidationLoader
from flux_trainer.data.sampler import open_mixture
from flux_trainer.data.samples import Batch, Sample, TrainSamples, ValidationSamples

Jsonl = Callable[..., Source]
SIZE = 8
G = 8  # global batch size
EPOCH = 21  # not a multiple of it


@pytest.fixture
def samples(jsonl: Jsonl) -> TrainSamples:
    """Two sources, every option in use, one sample broken."""
    section = Data(sources=[jsonl(6, "a", broken=(2,)), jsonl(9, "b")], crop="random", flip_prob=0.5)
    section.sources[0].repeats = 2
    mixture = open_mixture(section.sources, seed=5)
    assert mixture.block == EPOCH
    return TrainSamples(section, mixture, image_size=SIZE, seed=5, dropout_prob=0.3, joint_dropout=False)


def batches(
    samples: object, count: int, start: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0
) -> list[Batch]:
    loader = TrainLoader(
        Data(num_workers=workers),
        samples,
        start_draw=start,
        global_batch_size=G,
        rank=rank,
        world_size=world_size,
    )
    got = [next(loader) for _ in range(count)]
    loader.close()
    return got


def contents(parts: list[Batch]) -> list[tuple]:
    """Everything about the samples of some batches, in order."""
    return [
        (draw, image.numpy().tobytes(), caption, t5, clip)
        for b in parts
        for draw, image, caption, t5, clip in zip(
            b.draws.tolist(), b.images, b.captions, b.drop_t5.tolist(), b.drop_clip.tolist(), strict=True
        )
    ]


def test_global_batches_do_not_depend_on_ranks_or_workers(samples: TrainSamples) -> None:
    expected = contents(batches(samples, 6))
    assert [draw for draw, *_ in expected] == list(range(6 * G))
    for world_size in (2, 4):
        ranks = [batches(samples, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert contents([rank[step] for step in range(6) for rank in ranks]) == expected
    assert contents(batches(samples, 6, workers=2)) == expected


def test_resuming_anywhere_continues_the_order(samples: TrainSamples) -> None:
    expected = contents(batches(samples, 8))
    for start in (G, 2 * G, 3 * G, EPOCH - 1, EPOCH):  # past an epoch's end, and with another batch before
        assert contents(batches(samples, 2, start=start)) == expected[start : start + 2 * G]
    assert contents(batches(samples, 2, start=3 * G, workers=2)) == expected[3 * G : 5 * G]


def test_an_epoch_holds_every_sample(jsonl: Jsonl) -> None:
    section = Data(sources=[jsonl(16)])
    mixture = open_mixture(section.sources, seed=0)
    plain = TrainSamples(section, mixture, image_size=SIZE, seed=0, dropout_prob=0, joint_dropout=True)
    for start in (0, 16):
        captions = [caption for batch in batches(plain, 2, start=start) for caption in batch.captions]
        assert sorted(captions) == sorted(f"set {i}" for i in range(16))


def test_bad_samples_arrive_with_their_batch(samples: TrainSamples) -> None:
    got = batches(samples, 3, workers=1)  # a whole epoch and three more
    located = [samples.mixture.locate(draw) for draw in range(3 * G)]
    assert sum(batch.bad_draws for batch in got) == located.count((0, 2))
    assert {(record.index, "a" in record.source) for batch in got for record in batch.bad} == {(2, True)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_set_stops_with_its_reason(jsonl: Jsonl, workers: int) -> None:
    section = Data(sources=[jsonl(3, broken=(0, 1, 2))])
    mixture = open_mixture(section.sources, seed=0)
    broken = TrainSamples(section, mixture, image_size=SIZE, seed=0, dropout_prob=0, joint_dropout=True)
    with pytest.raises(
        DataError, match=r"(?s)^Draw 0 and 15 substitutes were all bad samples:.*corrupt image"
    ):
        batches(broken, 1, workers=workers)


def test_the_global_batch_must_divide(samples: TrainSamples) -> None:
    with pytest.raises(ValueError, match="global_batch_size = 8 is no multiple of the 3 ranks"):
        batches(samples, 1, world_size=3)


def count_letters(captions: Sequence[str]) -> dict[str, torch.Tensor]:
    return {"t5": torch.tensor([[len(caption), 1] for caption in captions])}


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_are_tokenized_where_they_are_loaded(samples: TrainSamples, workers: int) -> None:
    loader = TrainLoader(
        Data(num_workers=workers),
        samples,
        start_draw=0,
        global_batch_size=G,
        rank=0,
        world_size=1,
        tokenize=count_letters,
    )
    batch = next(loader)
    loader.close()
    assert torch.equal(batch.tokens["t5"], count_letters(batch.captions)["t5"])


class Slow:
    """Samples that take their time, or kill the process that asks for draw 2 G."""

    def __init__(self, seconds: float = 0.0, deadly: bool = False) -> None:
        self.seconds, self.deadly = seconds, deadly

    def get(self, draw: int) -> Sample:
        if self.deadly and draw == 2 * G:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return Sample(draw, torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), "")


def test_a_dead_worker_is_reported() -> None:
    with pytest.raises(DataError, match="A process that loads data died"):
        batches(Slow(deadly=True), 4, workers=1)


def test_stop_signals_do_not_reach_the_workers_and_close_ends_them() -> None:
    before = set(multiprocessing.active_children())
    options = {"start_draw": 0, "global_batch_size": G, "rank": 0, "world_size": 1}
    loader = TrainLoader(Data(num_workers=2), Slow(seconds=0.01), **options)
    next(loader)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for process in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(process.pid, number)
    assert [next(loader).draws[0].item() for _ in range(8)] == list(range(G, 9 * G, G))
    assert all(process.is_alive() for process in workers)
    start = time.perf_counter()
    loader.close()
    loader.close()
    assert time.perf_counter() - start < 2
    assert not any(process.is_alive() for process in workers)


SCRIPT = """
import os, signal, sys, torch
from flux_trainer.config.schema import Data
from flux_trainer.data.loader import TrainLoader
from flux_trainer.data.samples import Sample
class Blank:
    def get(self, draw): return Sample(draw, torch.zeros(3, 8, 8, dtype=torch.uint8), "")
options = dict(start_draw=0, global_batch_size=8, rank=0, world_size=1)
loader = TrainLoader(Data(num_workers=2), Blank(), **options)
next(loader)
print(*[process.pid for process in loader._workers._processes], flush=True)
if sys.argv[1] == "die": os.kill(os.getpid(), signal.SIGKILL)
raise SystemExit(3)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "status", "patience"), [("exit", 3, 0), ("die", -signal.SIGKILL, 15)])
def test_workers_end_with_the_program(ending: str, status: int, patience: float) -> None:
    """Also if it forgets to close the loader, or is killed: deaf to SIGTERM, they must end all the same."""
    program = subprocess.run(
        [sys.executable, "-c", SCRIPT, ending], stdout=subprocess.PIPE, timeout=200, text=True, check=False
    )
    assert program.returncode == status
    pids = [int(pid) for pid in program.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + patience
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, pids))


@pytest.mark.parametrize("count", [1, 7, 12])
def test_validation_is_the_same_for_any_number_of_ranks(jsonl: Jsonl, count: int) -> None:
    sections = [jsonl(12, broken=(5,))]
    samples = ValidationSamples(sections, count=count, image_size=SIZE, data=Data(max_pixels=1000))
    expected = [samples.get(i) for i in range(count)]
    for world_size, batch_size, workers in ((1, 1, 0), (1, 5, 0), (2, 2, 1), (4, 3, 0)):
        seen: dict[int, Sample] = {}
        lengths = set()
        for rank in range(world_size):
            loader = ValidationLoader(
                Data(num_workers=workers), samples, batch_size=batch_size, rank=rank, world_size=world_size
            )
            got = list(loader)
            assert len(got) == len(loader)
            assert all(len(batch.draws) == batch_size for batch in got)
            lengths.add(len(got))
            for batch in got:
                for k in range(batch_size):
                    draw = int(batch.draws[k])
                    assert draw not in seen
                    seen[draw] = Sample(draw, batch.images[k], batch.captions[k], valid=bool(batch.valid[k]))
        assert lengths == {-(-count // (batch_size * world_size))}
        assert all(torch.equal(seen[i].image, expected[i].image) for i in range(count))
        assert [seen[i].caption for i in range(count)] == [sample.caption for sample in expected]
        assert [i for i in sorted(seen) if seen[i].valid] == [i for i in range(count) if expected[i].valid]


def test_validation_can_be_repeated(jsonl: Jsonl) -> None:
    samples = ValidationSamples([jsonl(5)], count=-1, image_size=SIZE, data=Data(max_pixels=1000))
    loader = ValidationLoader(Data(num_workers=1), samples, batch_size=2, rank=0, world_size=1)
    assert contents(list(loader)) == contents(list(loader))
