"""Encoders that work ahead change the order of work, and nothing else."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from helpers.streams import FakeStreams
from helpers.tiny_run import TinyTrainer, lines, tiny_config, whole
from PIL import Image

from flux_trainer.config.schema import Training
from flux_trainer.data.loader import TrainLoader
from flux_trainer.parallel.arithmetic import encodes_ahead
from flux_trainer.runtime.ahead import one_ahead


class Ahead(TinyTrainer):
    """Works ahead on a CPU, too, where a test has put streams of its own; stops after step `last`."""

    last = 0

    def batches(self):
        return one_ahead(super().batches(), self.device)

    def micro_batches(self, batch):
        self.order.append(f"encode {batch.draws[0].item() // self.global_batch_size + 1}")
        return super().micro_batches(batch)

    def train_step(self, micro_batches):
        self.order.append(f"train {self.step + 1}")
        super().train_step(micro_batches)
        if self.step == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


def run(kind, folder, *flags, last=0):
    trainer = kind(tiny_config(folder, *flags))
    trainer.order, trainer.last = [], last
    trainer.train()
    return trainer


def figures(folder):
    """All lines of a run, without those of time and memory."""
    keys = ("step", "loss", "grad_norm", "samples_seen", "bad_samples", "validation_loss")
    return [{key: line[key] for key in keys if key in line} for line in lines(folder)]


def with_bad_ones(folder):
    """Flags for a folder of pictures of which every fourth is broken."""
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"picture {i}")
        if i % 4:
            Image.new("RGB", (16, 16), (12 * i, 100, 0)).save(folder / f"{i}.png")
        else:
            (folder / f"{i}.png").write_bytes(b"rubbish")
    return ["--data.sources.0.type=folder", f"--data.sources.0.path={folder}", "--data.max_bad_fraction=1"]


VALIDATION = [
    "--validation.enable",
    "--validation.freq=2",
    "--validation.timesteps=1",
    "--validation.sources.0.type=synthetic",
    "--validation.sources.0.size=3",
]


def test_a_run_is_bitwise_the_same_and_fetches_no_more(tmp_path, monkeypatch):
    """With accumulation, dropped captions, bad samples, validation in between, a stop and a resume."""
    flags = [*VALIDATION, *with_bad_ones(tmp_path / "pictures"), "--checkpoint.enable"]
    plain = run(TinyTrainer, tmp_path / "plain", *flags)
    FakeStreams(monkeypatch)
    fetched, fetch = [], TrainLoader.__next__
    monkeypatch.setattr(TrainLoader, "__next__", lambda loader: fetched.append(0) or fetch(loader))
    stopped = run(Ahead, tmp_path / "ahead", *flags, last=3)
    assert (stopped.step, stopped.samples_seen, len(fetched)) == (3, 24, 4)
    fetched.clear()
    resumed = run(Ahead, tmp_path / "ahead", *flags)
    assert resumed.order == ["encode 4", "encode 5", "train 4", "encode 6", "train 5", "train 6"]
    assert len(fetched) == 3
    assert resumed.bad_samples.bad_draws > 0
    before, after = figures(plain.dump_folder), figures(resumed.dump_folder)
    for line in after:
        if line["step"] > 3 and "bad_samples" in line:
            line["bad_samples"] += stopped.bad_samples.bad_draws  # each process counts its own
    assert [line for line in after if "loss" in line] == [line for line in before if "loss" in line]
    held_out = [
        {line["step"]: line for line in each if "validation_loss" in line} for each in (before, after)
    ]
    assert len(held_out[0]) == 4
    assert {step: held_out[1][step] for step in held_out[0]} == held_out[0]
    for name, tensor in plain.tensors().items():
        assert torch.equal(whole(resumed.tensors()[name]), whole(tensor)), name


def test_ranks_that_share_a_copy_of_the_model_do_not_work_ahead():
    alone = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp"), 1)
    assert encodes_ahead(Training(encode_ahead=True), alone)
    assert encodes_ahead(Training(encode_ahead=True), {**alone, "dp_replicate": 8})
    assert not encodes_ahead(Training(), alone)
    for name in ("pp", "dp_shard", "cp", "tp"):
        assert not encodes_ahead(Training(encode_ahead=True), {**alone, name: 2})


def test_elsewhere_than_on_cuda_it_has_no_effect(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("flux_trainer.trainer.one_ahead", lambda *_: order.append("ahead"))
    run(TinyTrainer, tmp_path, "--training.encode_ahead", "--training.steps=1")
    assert order == []


ON_A_GPU = [
    "--debug.deterministic",
    "--training.dtype=float32",
    "--training.mixed_precision_param=bfloat16",
    "--training.mixed_precision_reduce=float32",
    "--encoder.dtype=bfloat16",
    "--encoder.autoencoder_dtype=float32",
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
def test_a_run_on_a_gpu_is_bitwise_the_same(tmp_path):
    flags = [*ON_A_GPU, *VALIDATION]
    plain = run(TinyTrainer, tmp_path / "plain", *flags)
    ahead = run(TinyTrainer, tmp_path / "ahead", *flags, "--training.encode_ahead")
    assert figures(ahead.dump_folder) == figures(plain.dump_folder)
    for name, tensor in plain.tensors().items():
        assert torch.equal(whole(ahead.tensors()[name]), whole(tensor)), name


class SlowEncoders(TinyTrainer):
    """Whose encoding ends with a kernel of about 50 ms."""

    def micro_batches(self, batch):
        made = super().micro_batches(batch)
        torch.cuda._sleep(100_000_000)
        return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and TEST_GPU=1")
@pytest.mark.parametrize("ahead", [False, True])
def test_on_a_gpu_the_step_computes_while_the_next_batch_is_encoded(tmp_path, ahead):
    flags = [*ON_A_GPU, "--training.steps=4", "--metrics.log_freq=100"]
    flags += [f"--training.{'' if ahead else 'no-'}encode_ahead"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(SlowEncoders, tmp_path, *flags)
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    kernels = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel"]
    slow = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "kernel" and "spin" in event["name"]  # what _sleep is
    ]
    assert len(slow) == 4, "one for each step"
    beside = [(start, end) for start, end in kernels if any(s < start and end < e for s, e in slow)]
    assert bool(beside) == ahead
