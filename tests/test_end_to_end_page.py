"""The command that times whole steps beside torchtitan's: it compares before it times, and adds up."""

import argparse
import importlib
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_run import MODEL, ROOT, TinyTrainer, tiny_config

from flux_trainer.models.registry import FLAVORS

FLOAT32 = [
    *("--training.mixed_precision_param=float32", "--training.dtype=float32"),
    *("--encoder.dtype=float32", "--encoder.autoencoder_dtype=float32"),
    "--training.mixed_precision_reduce=float32",
]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("end_to_end"), importlib.import_module("step_times")


class Counterpart:
    """In torchtitan's place: the same step, written out; what it says of `wrong` is one percent off."""

    def __init__(self, trainer, images, wrong=""):
        self.trainer, self.images, self.wrong = trainer, images, wrong

    def batch(self, captions):
        return captions

    def forward_backward(self, captions, posterior, noise, t):
        trainer, encoders = self.trainer, self.trainer.encoders
        (model,) = trainer.parallel.parts
        pixels = self.images / 255.0 * 2.0 - 1.0
        ids = encoders.text.tokenize(captions)
        features = encoders.text.encode(ids)
        x_0 = encoders.autoencoder.encode(pixels, posterior)
        x_t = 0.5 * x_0 + 0.5 * noise
        out = model(**trainer.velocity.arguments(x_t, t, features.txt, features.vec, trainer.guidance(t)))
        loss = F.mse_loss(out, trainer.space.pack(noise - x_0))
        loss.backward()
        found = {
            "T5's tokens": ids["t5"],
            "CLIP's tokens": ids["clip"],
            "images": pixels,
            "T5": features.txt,
            "CLIP": features.vec,
            "latents": x_0,
            "loss": loss.detach(),
        }
        gradients = {name: p.grad for name, p in trainer.parameters.items()}
        trainer.optimizer.zero_grad()
        for values in (found, gradients):
            if self.wrong in values:
                values[self.wrong] = values[self.wrong] * 1.01
        return found, gradients


def test_nothing_is_timed_where_they_differ(modules, tmp_path, monkeypatch):
    end_to_end, _ = modules
    monkeypatch.setitem(FLAVORS, "flux-tiny", MODEL)  # as TinyTrainer does, for this test alone
    flags = [*FLOAT32, "--training.global_batch_size=4", "--training.classifier_free_guidance_prob=0"]
    trainer = TinyTrainer(tiny_config(tmp_path, *flags))
    loader = trainer.build_loader(0)
    batch = next(loader)
    errors = end_to_end.compare(trainer, Counterpart(trainer, batch.images), batch)
    assert len(errors) == 9
    assert max(errors.values()) < 1e-5
    assert all(p.grad is None for p in trainer.parameters.values())
    for wrong in ("CLIP", "latents", "loss", "img_in.weight"):
        with pytest.raises(SystemExit, match="computes something else"):
            end_to_end.compare(trainer, Counterpart(trainer, batch.images, wrong), batch)
    loader.close()
    trainer.close()


def test_the_parts_of_a_step_add_up_to_it(modules):
    _, step_times = modules

    class Someone:
        def __init__(self):
            self.calls = []

        def load(self):
            self.calls.append("load")

        def inner(self):
            self.calls.append("inner")

        def train(self, batch):
            self.inner()

    someone = Someone()
    contestant = step_times.Contestant("x", someone.load, someone.train, [("inner", someone, "inner")])
    times = step_times.take_turns([contestant], 3, torch.device("cpu"))["x"]
    assert someone.calls == ["load", "inner"] * (step_times.WARM + 3)
    assert len(times.steps) == 3
    assert times.parts.keys() == {step_times.DATA, "inner", step_times.REST}
    for i, seconds in enumerate(times.steps):
        assert 0 < sum(part[i] for part in times.parts.values()) <= seconds


def test_without_torchtitan_ours_is_timed_alone(modules, tmp_path, monkeypatch, capsys):
    end_to_end, _ = modules
    monkeypatch.chdir(ROOT)
    args = argparse.Namespace(
        config="train_configs/emoji_tiny.toml", batch=1, device="cpu", threads=1, rounds=1
    )
    result = end_to_end.measure_row(args, "fp32", end_to_end.OURS)
    page = end_to_end.page(args, {("fp32", end_to_end.OURS): result}, (1.0, 2.0, 3.0))
    (seconds,) = re.findall(r"^\| fp32 \| flux_trainer \| [\d.]+ \| ([\d.]+) s \|.* \|  \|$", page, re.M)
    (parts,) = re.findall(r"^\| fp32 \| flux_trainer \|((?: [\d.]+ s \|){4})$", page, re.M)
    assert sum(map(float, re.findall(r"[\d.]+", parts))) == pytest.approx(float(seconds), abs=0.01)
    assert "On a GPU this has not been measured." in page
    assert "Conditions" not in page


def test_the_page_has_the_ratio_and_the_differences(modules):
    end_to_end, step_times = modules
    args = argparse.Namespace(
        config=str(ROOT / "train_configs/flux_debug.toml"), batch=2, device="cpu", threads=1, rounds=3
    )
    parts = {
        name: [1.0] for name in (step_times.DATA, step_times.ENCODERS, step_times.MODEL, step_times.REST)
    }
    times = {
        end_to_end.OURS: step_times.Times([4.0, 1.0, 2.0], parts),
        end_to_end.TITAN: step_times.Times([3.0, 5.0, 4.0], parts),
    }
    page = end_to_end.page(args, {("bf16", end_to_end.TITAN): (times, {"loss": 0.0012})}, (1.0, 2.0, 3.0))
    assert "| bf16 | flux_trainer | 1.000 | 2.000 s | 1.000 to 4.000 |  |" in page
    assert "| bf16 | torchtitan | 0.500 | 4.000 s | 3.000 to 5.000 | 2.00 |" in page
    assert "| bf16 | torchtitan | 1e-03 |" in page
    assert "Conditions" in page


def test_random_numbers_can_be_given(modules):
    trainer = importlib.import_module("torchtitan_trainer")
    x = torch.zeros(2)
    first, second, t = torch.rand(3, 2)
    with trainer.Given(iter([first, second]), iter([t])), torch.device("cpu"):
        assert torch.randn_like(x) is first
        assert torch.rand((1,)) is t
        assert torch.randn_like(x) is second
    assert torch.randn_like(x) is not second
