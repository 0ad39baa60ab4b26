"""Autoencoders converted: diffusers opens them and computes the same; names tell which one a file holds."""

import dataclasses
import json
import os

import pytest
import torch
from helpers import golden
from helpers.golden import GOLDEN
from helpers.weights_files import SMALL_AE2, go, random_weights, same_files
from safetensors.torch import load_file, save_file

from flux_trainer.hub.autoencoder import build, load_autoencoder, read_config
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2Config


@torch.no_grad()
def test_the_autoencoder_too(tmp_path):
    from diffusers import AutoencoderKL

    folder = GOLDEN / "flux1_ae"
    config = AutoEncoderConfig(**json.loads((folder / "config.json").read_text())["bfl"])
    target = go(folder / "weights_bfl.safetensors", tmp_path / "out", "diffusers", config=config)
    theirs, info = AutoencoderKL.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.scaling_factor == config.scale_factor
    ours = build(config)
    ours.load_state_dict(load_file(folder / "weights_bfl.safetensors"))
    io = load_file(folder / "io.safetensors")
    mean, _ = ours.moments(io["in.image"])
    assert (theirs.encode(io["in.image"]).latent_dist.mean - mean).abs().max() < 1e-5
    z = io["in.z2"] / config.scale_factor + config.shift_factor
    assert (theirs.decode(z).sample - ours.decode(io["in.z2"])).abs().max() < 1e-5
    back = go(target, tmp_path / "back.safetensors", "bfl")
    assert same_files(folder / "weights_bfl.safetensors", back)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    target.rename(tmp_path / "pipeline" / "vae")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", back):
        loaded = load_autoencoder(place)
        assert loaded.config == config
        assert all(torch.equal(x, ours.state_dict()[name]) for name, x in loaded.state_dict().items())


@torch.no_grad()
def test_flux2s_autoencoder_too(tmp_path):
    """With its statistics, and a count that no dtype is chosen for and diffusers' own files may lack."""
    from diffusers import AutoencoderKLFlux2

    weights = random_weights(SMALL_AE2)
    save_file(weights, tmp_path / "ae.safetensors")
    (tmp_path / "ae.json").write_text(json.dumps(dataclasses.asdict(SMALL_AE2)))
    target = go(tmp_path / "ae.safetensors", tmp_path / "pipeline" / "vae", "diffusers")
    theirs, info = AutoencoderKLFlux2.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    back = go(target, tmp_path / "back.safetensors", "bfl")
    assert same_files(tmp_path / "ae.safetensors", back)
    for place in (tmp_path / "ae.safetensors", tmp_path / "pipeline", target, back):
        ours = load_autoencoder(place)
        assert ours.config == SMALL_AE2
        state = ours.state_dict()
        assert state.keys() == weights.keys()
        assert all(x.dtype == state[n].dtype and torch.equal(x, state[n]) for n, x in weights.items())
    image = 2 * torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0)) - 1
    z = torch.randn(1, 2, 8, 12, generator=torch.Generator().manual_seed(1))
    mean = torch.nn.functional.pixel_unshuffle(theirs.encode(image).latent_dist.mean, 2)
    assert (theirs.bn.eval()(mean) - ours.encode(image)).abs().max() < 1e-5
    latents = theirs.bn(torch.nn.functional.pixel_unshuffle(z, 2))
    assert (theirs.decode(z).sample - ours.decode(latents)).abs().max() < 1e-5

    low = go(target, tmp_path / "low.safetensors", "bfl", torch.bfloat16)
    held = load_file(low)
    assert torch.equal(held.pop("bn.num_batches_tracked"), torch.tensor(1001))
    assert {x.dtype for x in held.values()} == {torch.bfloat16}
    assert load_autoencoder(low, torch.float32).bn.num_batches_tracked == 1001
    assert "bfloat16" in (said := open_weights(low, "vae").describe())
    assert "int64" not in said

    file = target / "diffusion_pytorch_model.safetensors"
    without = load_file(file)
    del without["bn.num_batches_tracked"]
    save_file(without, file)
    assert load_autoencoder(target).bn.num_batches_tracked == 0
    assert torch.equal(load_autoencoder(target).bn.running_var, weights["bn.running_var"])
    again = load_file(go(target, tmp_path / "again.safetensors", "bfl"))
    zero = again["bn.num_batches_tracked"]
    assert (zero.dtype, zero.shape, zero.item()) == (torch.int64, (), 0)
    assert torch.equal(load_file(target_of_dcp(again, tmp_path))["bn.num_batches_tracked"], zero)


def target_of_dcp(weights, folder):
    """The weights through a checkpoint."""
    save_file(weights, folder / "x.safetensors")
    go(folder / "x.safetensors", folder / "step-0", "dcp", torch.bfloat16, SMALL_AE2)
    return go(folder / "step-0", folder / "y.safetensors", "bfl")


@pytest.mark.parametrize("name", ["flux1-ae", "flux2-ae"])
def test_published_autoencoders_are_told_by_their_names(name, tmp_path):
    """Files of the published sizes, without any config, and without content."""
    shapes, place, end = golden.key_maps()[name]["native"], {}, 0
    shapes = {n: shape for n, shape in shapes.items() if n != "bn.num_batches_tracked"}
    for key, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        place[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    header, path = json.dumps(place).encode(), tmp_path / "ae.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + end)
    published = AutoEncoderConfig() if name == "flux1-ae" else AutoEncoder2Config()
    assert read_config(path, None) == published
    assert open_weights(path, "vae").config == published
    assert read_config(tmp_path / "nothing", published) is published
