"""FLUX.2's autoencoder against diffusers' with the same weights (in float64), and the names of BFL's file."""

import pytest
import torch
from helpers import golden

from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config

NAMES = golden.key_maps()["flux2-ae"]
SMALL = AutoEncoder2Config(ch=32, z_channels=4)
TOLERANCE = {"atol": 1e-9, "rtol": 1e-9}


@pytest.fixture(scope="module")
def model() -> AutoEncoder2:
    """A small one with random weights and random statistics."""
    torch.manual_seed(0)
    model = AutoEncoder2(SMALL).double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    torch.nn.init.normal_(model.bn.running_mean)
    torch.nn.init.uniform_(model.bn.running_var, 1e-4, 2.0)  # some as small as epsilon
    return model


@pytest.fixture(scope="module")
def vae(model):
    """diffusers' autoencoder with the same weights."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(block_out_channels=(32, 64, 128, 128), latent_channels=4).double().eval()
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    ours = model.state_dict()
    weights = {
        theirs: ours[record.get("bfl", theirs)].reshape(shapes[theirs])  # attention: Linear, no convolutions
        for theirs, record in NAMES["diffusers"].items()
    }
    vae.load_state_dict(weights, strict=True)
    return vae


def squares(z: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, 4C, H/2, W/2], channels ordered (c, row in square, column)."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def normalised(p: torch.Tensor, vae) -> torch.Tensor:
    return (p - vae.bn.running_mean[:, None, None]) / (vae.bn.running_var + 1e-4).sqrt()[:, None, None]


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return 2 * torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1


def test_published_names_and_shapes():
    with torch.device("meta"):
        state = AutoEncoder2(AutoEncoder2Config()).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == NAMES["native"]
    config = AutoEncoder2Config()
    assert (config.downsampling, config.latent_channels) == (16, 128)


@torch.no_grad()
def test_encode(model, vae, image):
    latents = model.encode(image)
    assert latents.shape == (2, 16, 2, 3)
    expected = normalised(squares(vae.encode(image).latent_dist.mean), vae)
    torch.testing.assert_close(latents, expected, **TOLERANCE)
    torch.testing.assert_close(latents, vae.bn(squares(vae.encode(image).latent_dist.mean)), **TOLERANCE)


@torch.no_grad()
def test_decode(model, vae):
    z = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(model.decode(normalised(squares(z), vae)), vae.decode(z).sample, **TOLERANCE)


@torch.no_grad()
def test_noise_samples_the_posterior(model, vae, image):
    posterior = vae.encode(image).latent_dist
    noise = torch.randn_like(posterior.mean)
    expected = normalised(squares(posterior.mean + posterior.std * noise), vae)
    torch.testing.assert_close(model.encode(image, squares(noise)), expected, **TOLERANCE)


@torch.no_grad()
def test_training_mode_changes_nothing(model, image):
    before = {name: tensor.clone() for name, tensor in model.bn.state_dict().items()}
    latents = model.eval().encode(image)
    assert torch.equal(model.train().encode(image), latents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.bn.state_dict().items())


@pytest.mark.parametrize("sides", [(24, 32), (32, 40)])
def test_sides_that_are_no_multiples_of_16_are_refused(model, sides):
    with pytest.raises(
        ValueError, match=r"image of {}x{} cannot be encoded: use multiples of 16".format(*sides)
    ):
        model.encode(torch.zeros(1, 3, *sides, dtype=torch.float64))
