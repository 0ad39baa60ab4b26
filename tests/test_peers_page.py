"""The command that times our transformers beside others': it compares before it times; its page."""

import importlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.small_model import small
from helpers.tiny_run import ROOT

from flux_trainer.models import on_cpu
from flux_trainer.models.flops import train_flops_per_sample
from flux_trainer.models.registry import FLAVORS


@pytest.fixture
def peers() -> Any:
    pytest.importorskip("diffusers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("peers")
    finally:
        sys.path.pop(0)


def prepared(peers, monkeypatch):
    monkeypatch.setitem(FLAVORS, "small", small(mlp_ratio=4.0))
    return peers.prepare("small", torch.float32, 16, 5)


@pytest.mark.usefixtures("float32_frequencies")
def test_diffusers_has_the_same_outputs_and_gradients(peers, monkeypatch, capsys):
    contestants, probe = prepared(peers, monkeypatch)
    peers.compare(contestants, probe, 1e-5)
    assert [c.name for c in contestants] == ["flux_trainer", "diffusers"]
    count = len(list(contestants[0].model.parameters()))
    assert f"{count} gradients" in capsys.readouterr().out


def test_nothing_is_timed_where_they_differ(peers, monkeypatch):
    contestants, probe = prepared(peers, monkeypatch)
    with torch.no_grad():
        contestants[1].model.proj_out.weight[0, 0] += 0.1
    with pytest.raises(SystemExit, match="diffusers computes something else"):
        peers.compare(contestants, probe, 1e-4)


@pytest.mark.parametrize("whole", [512, 0], ids=("whole products", "flash"))
@pytest.mark.parametrize("threads", [1, 2])
def test_the_floor_has_every_matrix_product(peers, monkeypatch, threads, whole):
    """As many multiplications as in closed form, and attention's scores once more where it takes products."""
    monkeypatch.setitem(FLAVORS, "small", small(mlp_ratio=4.0))
    monkeypatch.setattr(sys.modules["flux_trainer.models.attention"], "SHORT", 0)
    monkeypatch.setitem(on_cpu.WHOLE, torch.float32, whole)
    contestants, probe = peers.prepare("small", torch.float32, 64, 37)
    torch.set_num_threads(threads)
    ours = contestants[0]
    try:
        with peers.Products() as products:
            ours.step(probe)
    finally:
        torch.set_num_threads(1)
    assert bool(products.by_onednn) == (threads > 1)
    found = sum(a.numel() * b.shape[-1] for a, b in products.found)
    found += sum(x.numel() * weight.shape[0] for x, weight in products.by_onednn)
    config = ours.model.config
    again = len(list(ours.model.blocks())) * 101 * 101 * config.hidden_size if whole else 0
    assert found == train_flops_per_sample(config, 64, 37) // 2 + again


@pytest.mark.slow
def test_the_page_is_written(tmp_path):
    pytest.importorskip("diffusers")
    command = [
        sys.executable,
        "benchmarks/peers.py",
        "--flavors",
        "flux-tiny",
        "flux2-tiny",
        "--rows",
        "fp32",
    ]
    command += ["bf16", "--rounds", "3", "--threads", "1", "--tokens", "16", "16", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = re.findall(
        r"^\| (flux2?-tiny) \| (\S+) \| ([\w ]+) \| (\S+) s \|", (tmp_path / "peers.md").read_text(), re.M
    )
    assert len(rows) == 2 * 2 * 3
    assert all(float(seconds) > 0 for *_, seconds in rows)
