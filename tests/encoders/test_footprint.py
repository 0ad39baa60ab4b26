"""The size of the encoders by arithmetic, against transformers' models and the ranks' shares of them."""

from math import ceil, prod
from pathlib import Path

import pytest
import torch
from helpers.small_llm import store

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.chat import CHATS
from flux_trainer.encoders.choose import text_encoders
from flux_trainer.encoders.footprint import (
    CLIP_L,
    LANGUAGE_MODELS,
    T5_XXL,
    clip_shapes,
    footprint,
    llm_shapes,
    t5_shapes,
)
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


@pytest.mark.parametrize("kind", ["flux2-dev", "flux2-klein"])
def test_language_models(kind, tmp_path):
    section = Encoder(llm_encoder=str(store(tmp_path, kind)), random_init=True, max_llm_encoding_len=64)
    parameters = list(text_encoders(section, kind, torch.device("cpu"), seed=0).model.parameters())
    for ranks in (1, 3):
        got = footprint(section, ranks, batch=1, img_size=32, kind=kind)
        assert got.llm == 2 * sum(ceil(p.shape[0] / ranks) * prod(p.shape[1:]) for p in parameters)
        assert (got.t5, got.clip, got.assumed) == (0, 0, ())
        assert got.autoencoder == 4 * 84_046_115
        assert got.weights == got.llm + got.autoencoder


@pytest.mark.parametrize(
    ("kind", "context_in_dim", "layers", "whole"),
    [
        ("flux2-dev", 15_360, 40, 23_572_403_200),
        ("flux2-klein", 7680, 36, 4_022_468_096),
        ("flux2-klein", 12_288, 36, 8_190_735_360),
    ],
)
def test_published_language_models(kind, context_in_dim, layers, whole):
    """As whole models: with all layers, the final norm and, but for Qwen3-4B, an output layer."""
    config = LANGUAGE_MODELS[context_in_dim // 3]
    table, layer = (sum(map(prod, shapes)) for shapes in llm_shapes(config, CHATS[kind]))
    tables = 1 if context_in_dim == 7680 else 2
    assert tables * table + layers * layer + config["hidden_size"] == whole
    got = footprint(Encoder(), 1, batch=1, img_size=32, kind=kind, context_in_dim=context_in_dim)
    assert got.llm == 2 * (table + CHATS[kind].states[-1] * layer)
    assert got.assumed == ("llm",)


def test_an_unknown_language_model_is_asked_for():
    with pytest.raises(ValueError, match=r"no language model of FLUX\.2 has width 256"):
        footprint(Encoder(), 1, batch=1, img_size=32, kind="flux2-klein", context_in_dim=768)
