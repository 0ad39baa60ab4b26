"""The models that a configuration can name, by family and flavor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flux_trainer.models.configs import Flux1Config

if TYPE_CHECKING:
    from flux_trainer.models.flux1 import Flux1Model

_FLUX_DEV = Flux1Config(
    in_channels=64,
    out_channels=64,
    vec_in_dim=768,
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=19,
    depth_single_blocks=38,
    axes_dim=(16, 56, 56),
    theta=10_000,
    qkv_bias=True,
    guidance_embed=True,
)
_FLUX_SCHNELL = replace(_FLUX_DEV, guidance_embed=False)

FLAVORS: dict[str, Flux1Config] = {
    "flux-dev": _FLUX_DEV,
    "flux-schnell": _FLUX_SCHNELL,
    # FLUX.1's widths in small: to debug and to measure with.
    "flux-debug": replace(_FLUX_SCHNELL, hidden_size=1536, num_heads=12, depth=2, depth_single_blocks=2),
    # For the embedded data set, with text encoders of width 256; a CPU trains it in minutes.
    "flux-tiny": replace(
        _FLUX_SCHNELL,
        vec_in_dim=256,
        context_in_dim=256,
        hidden_size=256,
        num_heads=4,
        depth=3,
        depth_single_blocks=6,
        axes_dim=(16, 24, 24),
    ),
}


def build(name: str, flavor: str) -> Flux1Model:
    """The model of that family and flavor, on torch's default device (`with torch.device("meta")`: no data).

    ValueError if there is none, naming those there are.
    """
    if name != "flux1":
        raise ValueError(f"There is no model family {name!r}; there is: flux1.")
    if flavor not in FLAVORS:
        raise ValueError(f"Family flux1 has no flavor {flavor!r}; there are: {', '.join(FLAVORS)}.")
    from flux_trainer.models.flux1 import Flux1Model  # imports torch, which the table above must not need

    return Flux1Model(FLAVORS[flavor])
