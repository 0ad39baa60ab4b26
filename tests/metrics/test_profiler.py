"""Traces are written where and when the settings say, and nothing happens when they are off."""

import gzip
import json

import pytest
import torch

from flux_trainer.config.schema import Profiling
from flux_trainer.metrics.profiler import Profiler

CPU = torch.device("cpu")


def train(profiler: Profiler, steps: int) -> None:
    with profiler:
        for _ in range(steps):
            torch.ones(4, 4) @ torch.ones(4, 4)
            profiler.step()


def test_traces_of_the_last_steps_of_each_period(tmp_path):
    section = Profiling(enable_profiling=True, profile_freq=4, profiler_active=2, profiler_warmup=1)
    train(Profiler(section, tmp_path, rank=3, device=CPU, step=100), steps=9)
    traces = sorted(tmp_path.rglob("*.json.gz"))
    assert [str(t.relative_to(tmp_path)) for t in traces] == [
        "profile_traces/step-104/rank3_trace.json.gz",
        "profile_traces/step-108/rank3_trace.json.gz",
    ]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2  # one in each active step


def test_off_writes_nothing(tmp_path):
    profiler = Profiler(Profiling(enable_memory_snapshot=True), tmp_path, rank=0, device=CPU)
    train(profiler, steps=20)
    assert list(tmp_path.iterdir()) == []


def test_periods_that_do_not_fit_are_refused(tmp_path):
    section = Profiling(enable_profiling=True, profile_freq=3, profiler_active=2, profiler_warmup=2)
    with pytest.raises(ValueError, match="profile_freq is 3"):
        Profiler(section, tmp_path, rank=0, device=CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_snapshots(tmp_path):
    section = Profiling(enable_memory_snapshot=True, profile_freq=2)
    profiler = Profiler(section, tmp_path, rank=0, device=torch.device("cuda"))
    with profiler:
        for _ in range(2):
            torch.ones(4, 4, device="cuda")
            profiler.step()
    assert (tmp_path / "memory_snapshot/step-2/rank0_memory.pickle").is_file()
