"""The models that a configuration can name, by family and flavor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from flux_trainer.models.configs import Flux1Config, Flux2Config, ModelConfig

if TYPE_CHECKING:  # torch, which the table must not need
    from flux_trainer.models.model import FluxModel

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

_FLUX2_DEV = Flux2Config(
    in_channels=128,
    context_in_dim=15_360,
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single_blocks=48,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    mlp_ratio=3.0,
    use_guidance_embed=True,
)
_FLUX2_KLEIN = replace(
    _FLUX2_DEV,
    context_in_dim=7680,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single_blocks=20,
    use_guidance_embed=False,
)

FLAVORS: dict[str, ModelConfig] = {
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
    "flux2-dev": _FLUX2_DEV,
    "flux2-klein-4b": _FLUX2_KLEIN,
    "flux2-klein-9b": replace(
        _FLUX2_KLEIN,
        context_in_dim=12_288,
        hidden_size=4096,
        num_heads=32,
        depth=8,
        depth_single_blocks=24,
    ),
    # The same for FLUX.2; the text encoder of the tiny one gives three layers of width 256.
    "flux2-debug": replace(_FLUX2_KLEIN, hidden_size=1536, num_heads=12, depth=2, depth_single_blocks=4),
    "flux2-tiny": replace(
        _FLUX2_KLEIN,
        context_in_dim=3 * 256,
        hidden_size=256,
        num_heads=4,
        depth=3,
        depth_single_blocks=6,
        axes_dim=(16, 16, 16, 16),
    ),
}


def model_class(config: ModelConfig) -> type[FluxModel]:
    """The class of the models of that shape."""
    from flux_trainer.models.flux1 import Flux1Model
    from flux_trainer.models.flux2 import Flux2Model

    classes: dict[type, type[FluxModel]] = {Flux1Config: Flux1Model, Flux2Config: Flux2Model}
    return classes[type(config)]


def build(name: str, flavor: str) -> FluxModel:
    """The model of that family and flavor, on torch's default device (`with torch.device("meta")`: no data).

    ValueError if there is none, naming those there are.
    """
    flavors = [key for key, config in FLAVORS.items() if config.family == name]
    if not flavors:
        families = dict.fromkeys(config.family for config in FLAVORS.values())
        raise ValueError(f"There is no model family {name!r}; there are: {', '.join(families)}.")
    if flavor not in flavors:
        raise ValueError(f"Family {name} has no flavor {flavor!r}; there are: {', '.join(flavors)}.")
    return model_class(FLAVORS[flavor])(FLAVORS[flavor])
