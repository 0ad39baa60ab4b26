"""Models of the smallest sizes at which nothing hides: several heads, axes, and blocks of both kinds."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flux_trainer.models.configs import Flux1Config, Flux2Config, ModelConfig
from flux_trainer.models.registry import model_class

_SMALL = Flux1Config(
    in_channels=64,
    out_channels=64,
    vec_in_dim=12,
    context_in_dim=20,
    hidden_size=32,
    mlp_ratio=2.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(2, 2, 4),
    theta=10000,
    qkv_bias=True,
    guidance_embed=True,
)
_SMALL2 = Flux2Config(
    in_channels=12,
    context_in_dim=20,
    hidden_size=32,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=(2, 2, 2, 2),
    theta=2000,
    mlp_ratio=3.0,
    use_guidance_embed=True,
)


def small(**changes: Any) -> Flux1Config:
    return replace(_SMALL, **changes)


def small2(**changes: Any) -> Flux2Config:
    return replace(_SMALL2, **changes)


def inputs(
    config: ModelConfig,
    batch: int,
    *,
    image: int = 6,
    text: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random values by the names of `FluxModel.arguments`, positions too."""
    g = torch.Generator().manual_seed(seed)
    axes = len(config.axes_dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=g, dtype=dtype)

    return {
        "image": normal(image, config.in_channels),
        "image_ids": torch.randint(0, 40, (batch, image, axes), generator=g).float(),
        "text": normal(text, config.context_in_dim),
        "text_ids": torch.randint(0, 40, (batch, text, axes), generator=g).float(),
        "timesteps": torch.rand(batch, generator=g, dtype=dtype),
        "pooled": normal(config.vec_in_dim),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
    }


def arguments(config: ModelConfig, batch: int, **options: Any) -> dict[str, Tensor]:
    """The same by the names of the model's arguments."""
    return model_class(config).arguments(**inputs(config, batch, **options))
