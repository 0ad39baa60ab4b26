"""The size of the encoders by arithmetic, against transformers' models and the ranks' shares of them."""

from math import ceil, prod
from pathlib import Path

import pytest
import torch

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.footprint import CLIP_L, T5_XXL, clip_shapes, footprint, t5_shapes
from flux_trainer.hub.autoencoder import load_autoencoder

ASSETS = Path(__file__).parents[2] / "assets"


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_embedded_encoders(ranks):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    section = Encoder(
        t5_encoder=str(ASSETS / "encoders/t5-tiny"),
        clip_encoder=str(ASSETS / "encoders/clip-tiny"),
        autoencoder_path=str(ASSETS / "autoencoder/ae.safetensors"),
    )
    got = footprint(section, ranks, batch=2, img_size=64)
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config.from_pretrained(section.t5_encoder))
        clip = CLIPTextModel(CLIPTextConfig.from_pretrained(section.clip_encoder))
    assert got.t5 == 2 * sum(ceil(p.shape[0] / ranks) * prod(p.shape[1:]) for p in t5.parameters())
    assert got.clip == 2 * sum(p.numel() for p in clip.parameters())
    autoencoder = load_autoencoder(section.autoencoder_path)
    assert got.autoencoder == sum(p.nbytes for p in autoencoder.parameters())
    assert got.encoding > 0
    assert got.assumed == ()


def test_published_sizes():
    root, block, bias = (sum(map(prod, shapes)) for shapes in t5_shapes(T5_XXL))
    assert root + 24 * block + bias == 4_762_310_656
    assert sum(map(prod, clip_shapes(CLIP_L))) == 123_060_480
