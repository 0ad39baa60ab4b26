"""The autoencoder against golden files of BFL's code, the errors of loading one, and the committed one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flux_trainer.hub.autoencoder import load_autoencoder
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "flux1_ae"
ASSETS = Path(__file__).parents[2] / "assets"
COMMITTED = ASSETS / "autoencoder" / "ae.safetensors"
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def model():
    config = AutoEncoderConfig(**json.loads((GOLDEN / "config.json").read_text())["bfl"])
    model = AutoEncoder(config)
    model.load_state_dict(load_file(GOLDEN / "weights_bfl.safetensors"), strict=True)
    return model


@pytest.fixture
def folder(tmp_path):
    """A folder with a loadable autoencoder: `ae.safetensors` and `ae.json`."""
    config = json.loads((GOLDEN / "config.json").read_text())["bfl"]
    (tmp_path / "ae.json").write_text(json.dumps(config))
    save_file(load_file(GOLDEN / "weights_bfl.safetensors"), tmp_path / "ae.safetensors")
    return tmp_path


@torch.no_grad()
def test_encode(model, io):
    mean, logvar = model.moments(io["in.image"])
    torch.testing.assert_close(torch.cat([mean, logvar], dim=1), io["moments"], **TOLERANCE)
    torch.testing.assert_close(model.encode(io["in.image"]), io["latents"], **TOLERANCE)
    torch.testing.assert_close(model.encode(io["in.image"], io["noise"]), io["latents_sampled"], **TOLERANCE)


@torch.no_grad()
def test_decode(model, io):
    torch.testing.assert_close(model.decode(io["latents"]), io["decoded"], **TOLERANCE)
    torch.testing.assert_close(model.decode(io["in.z2"]), io["decoded2"], **TOLERANCE)


def test_gradient_of_decode(model, io):
    z = io["in.z2"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model.decode(z) * io["probe2"]).sum(), z)
    expected = io["grad.z2"]
    assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_log_variance_is_clamped(model, io):
    extreme = AutoEncoder(model.config)
    extreme.load_state_dict(model.state_dict())
    extreme.encoder.conv_out.bias[16:24] = 1e4
    extreme.encoder.conv_out.bias[24:] = -1e4
    _, logvar = extreme.moments(io["in.image"])
    assert (logvar[:, :8] == 20).all()
    assert (logvar[:, 8:] == -30).all()


def test_config_defaults_are_those_of_flux1():
    """Names and shapes of the published ae.safetensors, by its number of parameters (83,819,683)."""
    with torch.device("meta"):
        model = AutoEncoder(AutoEncoderConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683
    assert model.config.downsampling == 8


def test_odd_image_size_is_refused(model):
    with pytest.raises(ValueError, match=r"15x16.*multiples of 2"):
        model.encode(torch.zeros(1, 3, 15, 16))


def test_load(folder, io):
    model = load_autoencoder(folder / "ae.safetensors")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.encode(io["in.image"]), io["latents"], **TOLERANCE)
    rounded = load_autoencoder(folder / "ae.safetensors", torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


def test_missing_file_is_named_with_the_command_that_brings_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_autoencoder(tmp_path / "nothing.safetensors")
    command = "hf download black-forest-labs/FLUX.1-dev ae.safetensors"
    for part in ("nothing.safetensors", str(tmp_path), command):
        assert part in str(error.value)


def test_wrong_parameters_are_named(folder):
    weights = load_file(folder / "ae.safetensors")
    del weights["decoder.conv_in.bias"]
    weights["quant_conv.weight"] = torch.zeros(1)
    weights["encoder.conv_in.bias"] = torch.zeros(5)
    save_file(weights, folder / "ae.safetensors")
    with pytest.raises(ValueError, match=r"the config in ae\.json") as error:
        load_autoencoder(folder / "ae.safetensors")
    missing, unknown = "1 missing (decoder.conv_in.bias)", "1 unknown (quant_conv.weight"
    for part in (missing, unknown, "1 misshapen (encoder.conv_in.bias [5] instead of [32])"):
        assert part in str(error.value)


def test_without_a_config_the_weights_are_taken_for_flux1s(folder):
    (folder / "ae.json").unlink()
    with pytest.raises(ValueError, match=r"does not fit FLUX\.1's config"):
        load_autoencoder(folder / "ae.safetensors")


def test_damaged_files_are_named(folder):
    (folder / "ae.json").write_text('{"channels": 3}')
    with pytest.raises(ValueError, match=r"ae\.json cannot be used: it has the fields channels"):
        load_autoencoder(folder / "ae.safetensors")
    (folder / "ae.json").write_text("{")
    with pytest.raises(ValueError, match=r"ae\.json is not valid JSON"):
        load_autoencoder(folder / "ae.safetensors")
    (folder / "ae.json").unlink()
    (folder / "ae.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_autoencoder(folder / "ae.safetensors")


def pictures(split, every):
    """Pictures of a split, one of every `every`, at 64 px: [N, 3, 64, 64] in [-1, 1]."""
    lines = (ASSETS / "emoji" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["file_name"] for line in lines[::every]]
    images = [Image.open(ASSETS / "emoji" / name).convert("RGB") for name in names]
    pixels = [np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def test_the_committed_file_is_small_and_bfloat16():
    assert COMMITTED.stat().st_size <= 6e6
    assert {weight.dtype for weight in load_file(COMMITTED).values()} == {torch.bfloat16}


@torch.no_grad()
def test_committed_latents_have_mean_0_and_deviation_1():
    """What its shift and scale are for: sampled latents of training pictures, all elements together."""
    images = pictures("train", every=20)
    noise = torch.randn(len(images), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = load_autoencoder(COMMITTED).encode(images, noise)
    assert latents.shape == noise.shape
    assert latents.mean().item() == pytest.approx(0, abs=0.05)
    assert latents.std().item() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_the_committed_one_draws_held_out_pictures():
    model = load_autoencoder(COMMITTED)
    images = pictures("validation", every=4)
    error = (model.decode(model.encode(images)).clamp(-1, 1) - images) / 2  # of pictures in [0, 1]
    psnr = -10 * error.square().mean().log10().item()
    assert psnr > 26
