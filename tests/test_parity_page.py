"""The command that compares with diffusers: it writes its page, and its figures are small."""

import importlib
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_run import ROOT
from PIL import Image
from safetensors.torch import save_file

from flux_trainer.models import registry


@pytest.mark.slow
def test_the_page_is_written_and_its_differences_are_small(tmp_path):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = registry.build("flux1", "flux-tiny")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    settings = {
        "model.flavor": "flux-tiny",
        "encoder.t5_encoder": "assets/encoders/t5-tiny",
        "encoder.clip_encoder": "assets/encoders/clip-tiny",
        "encoder.t5_tokenizer": "assets/tokenizers/t5",
        "encoder.clip_tokenizer": "assets/tokenizers/clip",
        "encoder.random_init": "true",
        "encoder.max_t5_encoding_len": "16",
        "encoder.autoencoder_path": "assets/autoencoder/ae.safetensors",
        "training.img_size": "32",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    own = ["--steps", "2", "--samples", "4", "--prompts", "red apple", "dog", "--out", str(tmp_path)]
    command = [sys.executable, "benchmarks/parity.py", str(tmp_path / "model.safetensors"), *own, *flags]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    page = (tmp_path / "parity.md").read_text()
    assert "--prompts 'red apple' dog --out" in page
    assert Image.open(tmp_path / "parity.png").size[0] > 300
    velocities = re.findall(r"\| velocity.* \| (\S+) of (\S+) \|", page)
    assert len(velocities) == 2
    assert all(float(a) < 1e-5 * float(b) for a, b in velocities)
    losses = re.findall(r"^\| 0\.\d{4} \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(losses) == 8
    assert all(float(difference) < 1e-5 * float(ours) for ours, _, difference in losses)
    (levels,) = re.findall(r"levels of 255.* \| (\d+), mean", page)
    assert int(levels) <= 1


def test_a_wrong_path_is_a_sentence(tmp_path):
    command = [sys.executable, "benchmarks/parity.py", str(tmp_path / "gone"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"{tmp_path}/gone: there is no such file or folder")
    assert "Traceback" not in done.stderr


def test_the_lower_row_comes_from_diffusers_autoencoder():
    """Of latents in the autoencoder's own scale, with the rounding of bytes."""
    parity = pytest.importorskip("diffusers") and load_script()
    config = SimpleNamespace(scaling_factor=2.0, shift_factor=0.5)
    vae = SimpleNamespace(config=config, decode=lambda z: SimpleNamespace(sample=z))
    assert parity.decoded(vae, torch.tensor([-3.0, -1.0, 0.0, 9.0])).tolist() == [0, 128, 191, 255]


def load_script() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("parity")
    finally:
        sys.path.pop(0)
