"""The command that times the start: what it times is there, each moment counts once, and its page adds up."""

import argparse
import importlib

import pytest
from helpers.tiny_run import ROOT


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("startup"), importlib.import_module("startup_probe")


def test_every_part_of_the_trainer_that_is_timed_exists(modules):
    _, probe = modules
    for call in (call for calls in probe.PARTS.values() for call in calls):
        owner, name = probe.owner_of(call)
        assert callable(getattr(owner, name)), call
    assert probe.IMPORTED_IN.keys() <= {call for calls in probe.PARTS.values() for call in calls}


def test_a_moment_is_charged_to_the_innermost_part(modules, monkeypatch):
    _, probe = modules
    now = iter([1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(probe.time, "monotonic", lambda: next(now))
    clock = probe.Clock(0.0, "outside")
    with clock.part("outer"), clock.part("inner"):
        pass
    assert clock.seconds == {"outside": 1.0, "outer": 2.0 + 8.0, "inner": 4.0}


def test_the_page_has_the_medians_and_the_share_of_reading(modules):
    startup, _ = modules
    found = {
        "train": {startup.TRAIN: [5.0, 9.0, 6.0]},
        "stages": {"import torch": [1.0, 2.0, 1.5], "first step": [3.0, 2.0, 2.5]},
        "imports": {"torch": [1.0, 1.5, 1.25]},
        "commands": {"python -c pass": [0.01, 0.03, 0.02]},
        "load": {
            f"{what} {name}": [seconds] * 3
            for name in ("bf16.safetensors", "fp32.safetensors", "step-1")
            for what, seconds in (("read", 0.5), ("load" if "." in name else "fill", 0.75))
        }
        | {"verify step-1": [0.25] * 3},
    }
    sizes = {"bf16.safetensors": 5e8, "fp32.safetensors": 1e9, "step-1": 3e9}
    args = argparse.Namespace(rounds=3, flavor="flux-debug")
    page = startup.page(args, found, sizes, (1.0, 2.0, 3.0))
    assert "| `python -m flux_trainer.train` | 6.000 s | 5.000 to 9.000 |" in page
    assert "| import torch | 1.50 s | 38% |" in page
    assert "| all | 4.00 s | |" in page
    assert "| bf16.safetensors | 0.50 GB | 0.50 s | 0.75 s | 1.5 |" in page
    assert "| step-1 | 3.00 GB | 0.50 s | 0.25 + 0.75 s | 2.0 |" in page
