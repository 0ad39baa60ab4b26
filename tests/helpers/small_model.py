"""A FLUX.1 of the smallest sizes at which nothing hides: several heads, axes, and blocks of both kinds."""

from dataclasses import replace
from typing import Any

from flux_trainer.models.configs import Flux1Config

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


def small(**changes: Any) -> Flux1Config:
    return replace(_SMALL, **changes)
