"""Images in and out of the autoencoder, and whole samples."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.bundle import Encoders
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig

ASSETS = Path(__file__).parents[2] / "assets"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def section(tmp_path_factory) -> Encoder:
    """Small random encoders, and a stored random autoencoder with four latent channels."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, sizes in (("t5", {"d_model": 16}), ("clip", {"hidden_size": 16})):
        values = json.loads((ASSETS / "encoders" / f"{name}-tiny" / "config.json").read_text())
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**values, **sizes}))
    path = folder / "ae.safetensors"
    config = AutoEncoderConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16)
    torch.manual_seed(0)
    save_file(AutoEncoder(config).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(asdict(config)))
    return Encoder(
        t5_encoder=str(folder / "t5"),
        clip_encoder=str(folder / "clip"),
        t5_tokenizer=str(ASSETS / "tokenizers" / "t5"),
        clip_tokenizer=str(ASSETS / "tokenizers" / "clip"),
        autoencoder_path=str(path),
        max_t5_encoding_len=8,
        random_init=True,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def encoders(section) -> Encoders:
    return Encoders(section, CPU, seed=0)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_the_autoencoder_of_another_family_is_refused(section):
    with pytest.raises(
        ValueError, match="16 channels at 1/8 of the size, but the transformer takes 128 at 1/16"
    ):
        Encoders(section, CPU, seed=0, kind="flux2-klein")


def test_latents_of_normalised_images(encoders, images):
    latents = encoders.encode_images(images)
    expected = encoders.autoencoder.encode((images.float() - 127.5) / 127.5)  # [0, 255] -> [-1, 1]
    assert latents.shape == (2, 16, 4, 4)
    torch.testing.assert_close(latents, expected)
    assert not latents.requires_grad
    assert not any(p.requires_grad for p in encoders.autoencoder.parameters())


def test_noise_samples_the_posterior(encoders, images):
    noise = torch.randn(2, 16, 4, 4)
    latents = encoders.encode_images(images, noise)
    mean, logvar = encoders.autoencoder.moments(images.float() / 127.5 - 1)
    config = encoders.autoencoder.config
    expected = config.scale_factor * (mean + (0.5 * logvar).exp() * noise - config.shift_factor)
    torch.testing.assert_close(latents, expected)
    zero = encoders.encode_images(images, torch.zeros_like(noise))
    torch.testing.assert_close(zero, encoders.encode_images(images))


def test_decoded_images_are_bytes(encoders, monkeypatch):
    wide = torch.linspace(-2, 2, 3 * 8 * 8).reshape(1, 3, 8, 8)
    monkeypatch.setattr(encoders.autoencoder, "decode", lambda latents: wide)
    image = encoders.decode(torch.zeros(1, 4, 1, 1))
    assert image.dtype == torch.uint8
    expected = ((wide.double() + 1) / 2 * 255).clamp(0, 255).round()
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1)
    assert (image.min(), image.max()) == (0, 255)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_survive_the_way_to_the_autoencoder_and_back(section, monkeypatch, dtype):
    encoders = Encoders(section.model_copy(update={"autoencoder_dtype": dtype}), CPU, seed=0)
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    monkeypatch.setattr(encoders.autoencoder, "encode", lambda image, noise: image)
    nearest = (every.float() / 127.5 - 1).to(encoders.dtype)
    assert torch.equal(encoders.encode_images(every), nearest)
    monkeypatch.setattr(encoders.autoencoder, "decode", lambda latents: latents)
    assert torch.equal(encoders.decode(encoders.encode_images(every)), every)


def test_whole_samples(encoders, images):
    ids = encoders.text.tokenize(["an apple", "a pear"])
    drop = torch.tensor([False, True])
    encoded = encoders.encode(images, ids, drop_t5=drop, drop_clip=~drop)
    features = encoders.text.encode(ids)
    torch.testing.assert_close(encoded.latents, encoders.encode_images(images))
    torch.testing.assert_close(encoded.txt[0], features.txt[0])
    torch.testing.assert_close(encoded.txt[1], encoders.text.empty.txt[0])
    torch.testing.assert_close(encoded.vec[0], encoders.text.empty.vec[0])
    torch.testing.assert_close(encoded.vec[1], features.vec[1])


def test_dtypes(section, images):
    mixed = section.model_copy(update={"autoencoder_dtype": "float64", "dtype": "bfloat16"})
    encoders = Encoders(mixed, CPU, seed=0)
    no = torch.zeros(2, dtype=torch.bool)
    encoded = encoders.encode(images, encoders.text.tokenize(["x", "y"]), no, no, torch.zeros(2, 16, 4, 4))
    assert encoded.latents.dtype == torch.float64
    assert encoded.txt.dtype == encoded.vec.dtype == torch.bfloat16
