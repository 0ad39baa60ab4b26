"""A transformer's config from the shapes of its native parameters, for files that do not say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flux_trainer.models.configs import Flux1Config

_AXES = {128: (16, 56, 56)}
"""Head dimension -> rotary axes, of all published FLUX.1 models."""


def flux1(shapes: Mapping[str, tuple[int, ...]], flavors: Mapping[str, Flux1Config]) -> Flux1Config | None:
    """The config of a FLUX.1 transformer; None if the shapes do not tell.

    Rotary axes and base are no parameters: a head of 128 has those of the published models, another one those
    of the flavor that is equal in everything else.
    """
    try:
        hidden, in_channels = shapes["img_in.weight"]
        mlp = shapes.get("double_blocks.0.img_mlp.0.bias", shapes.get("single_blocks.0.linear1.bias"))
        norm = (
            shapes.get("double_blocks.0.img_attn.norm.query_norm.scale")
            or shapes["single_blocks.0.norm.query_norm.scale"]
        )
        assert mlp is not None
        double = "double_blocks.0.img_mlp.0.bias" in shapes
        mlp_hidden = mlp[0] if double else mlp[0] - 3 * hidden
        found: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": shapes["final_layer.linear.weight"][0],
            "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
            "context_in_dim": shapes["txt_in.weight"][1],
            "hidden_size": hidden,
            "mlp_ratio": mlp_hidden / hidden,
            "num_heads": hidden // norm[0],
            "depth": _blocks(shapes, "double_blocks"),
            "depth_single_blocks": _blocks(shapes, "single_blocks"),
            "qkv_bias": not double or "double_blocks.0.img_attn.qkv.bias" in shapes,
            "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        }
    except (KeyError, ValueError, IndexError):
        return None
    if axes := _AXES.get(norm[0]):
        return Flux1Config(**found, axes_dim=axes, theta=10_000)
    for flavor in flavors.values():
        if all(getattr(flavor, name) == value for name, value in found.items()):
            return flavor
    return None


def _blocks(shapes: Mapping[str, tuple[int, ...]], kind: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})
