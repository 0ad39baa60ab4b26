"""The command that compares with diffusers: it writes its page, and its figures are small."""

import importlib
import os
import re
import shutil
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
    """Of both families at once: weights with random values everywhere, and their autoencoder beside them."""
    pytest.importorskip("diffusers")
    weights = []
    for family, flavor, autoencoder in (("flux1", "flux-tiny", "ae"), ("flux2", "flux2-tiny", "flux2_ae")):
        torch.manual_seed(0)
        model = registry.build(family, flavor)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        (tmp_path / family).mkdir()
        save_file(dict(model.state_dict()), tmp_path / family / "model.safetensors")
        for kind in ("safetensors", "json"):
            shutil.copy(ROOT / f"assets/autoencoder/{autoencoder}.{kind}", tmp_path / family / f"ae.{kind}")
        weights.append(str(tmp_path / family / "model.safetensors"))
    settings = {
        "encoder.t5_encoder": "assets/encoders/t5-tiny",
        "encoder.clip_encoder": "assets/encoders/clip-tiny",
        "encoder.t5_tokenizer": "assets/tokenizers/t5",
        "encoder.clip_tokenizer": "assets/tokenizers/clip",
        "encoder.llm_encoder": "assets/encoders/qwen3-tiny",
        "encoder.llm_tokenizer": "assets/tokenizers/qwen3-tiny",
        "encoder.random_init": "true",
        "encoder.max_t5_encoding_len": "16",
        "encoder.max_llm_encoding_len": "32",
        "training.img_size": "32",
    }
    flags = [f"--{key}={value}" for key, value in settings.items()]
    own = ["--steps", "2", "--samples", "4", "--prompts", "red apple", "dog", "--out", str(tmp_path)]
    command = [sys.executable, "benchmarks/parity.py", *weights, *own, *flags]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    page = (tmp_path / "parity.md").read_text()
    assert "--prompts 'red apple' dog --out" in page
    assert re.findall("## (.*) against diffusers", page) == ["flux-tiny", "flux2-tiny"]
    width, height = Image.open(tmp_path / "parity.png").size
    assert width > 300
    assert height > 4 * 160
    differences = re.findall(r"\| (?:velocity|latents of images).* \| (\S+) of (\S+) \|", page)
    assert len(differences) == 6
    assert all(float(a) < 1e-5 * float(b) for a, b in differences)
    losses = re.findall(r"^\| 0\.\d{4} \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert len(losses) == 16
    assert all(float(difference) < 1e-5 * float(ours) for ours, _, difference in losses)
    assert [int(n) <= 1 for n in re.findall(r"levels of 255.* \| (\d+), mean", page)] == [True, True]


@pytest.mark.slow
def test_a_wrong_path_is_a_sentence(tmp_path):
    command = [sys.executable, "benchmarks/parity.py", str(tmp_path / "gone"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"There is no file or folder {tmp_path}/gone.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_the_lower_rows_come_from_diffusers_autoencoder(family):
    """Of latents in the autoencoder's own scale, with the rounding of bytes."""
    pytest.importorskip("diffusers")
    counterpart, parity = load_script("counterpart"), load_script("parity")
    theirs = object.__new__(counterpart.COUNTERPARTS[family])
    config = SimpleNamespace(scaling_factor=2.0, shift_factor=0.5, batch_norm_eps=0.1)
    bn = SimpleNamespace(running_mean=torch.full((4,), 0.5), running_var=torch.full((4,), 0.15))
    theirs.vae = SimpleNamespace(config=config, bn=bn, decode=lambda z: SimpleNamespace(sample=z))
    latents = torch.tensor([-3.0, -1.0, 0.0, 9.0]).view(1, 4, 1, 1)
    want = [0, 128, 191, 255]  # of z = x / 2 + 1 / 2, by either way to normalise
    assert parity.to_bytes(theirs.decode(latents)).flatten().tolist() == want


def load_script(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)
