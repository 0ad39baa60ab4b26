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


def test_the_floor_has_every_matrix_product(peers, monkeypatch):
    """Each linear's three (the first ones lack one: inputs need no gradient), and attention's six a block."""
    contestants, probe = prepared(peers, monkeypatch)
    monkeypatch.setattr(sys.modules["flux_trainer.models.attention"], "SHORT", 0)
    ours = contestants[0]
    linears = sum(isinstance(m, torch.nn.Linear) for m in ours.model.modules())
    firsts = 5  # img_in, txt_in and the first layers of three embedders
    with peers.Products() as products:
        ours.step(probe)
    assert len(products.found) == 3 * linears - firsts + 6 * len(list(ours.model.blocks()))
    multiplications = sum(a.shape[:-1].numel() * b.shape[-1] * a.shape[-1] for a, b in products.found)
    one_block = 21 * 21 * 32  # tokens^2 x heads x head dimension
    assert multiplications > 6 * 4 * one_block


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
