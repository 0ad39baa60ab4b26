"""A transformer's config from the shapes of its native parameters, for files that do not say it.

Rotary axes and base are no parameters: a head of 128 has those of the family's published models, another one
those of the flavor that is equal in everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flux_trainer.models.configs import Flux1Config, Flux2Config

Shapes = Mapping[str, tuple[int, ...]]

_HEAD = 128
"""Dimension of a head of all published models."""


def flux1(shapes: Shapes, flavors: Mapping[str, Flux1Config]) -> Flux1Config | None:
    """The config of a FLUX.1 transformer; None if the shapes do not tell."""

    def fields() -> dict[str, Any]:
        double = "double_blocks.0.img_mlp.0.bias" in shapes
        return {
            **_fields(shapes),
            "out_channels": shapes["final_layer.linear.weight"][0],
            "vec_in_dim": shapes["vector_in.in_layer.weight"][1],
            "qkv_bias": not double or "double_blocks.0.img_attn.qkv.bias" in shapes,
            "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        }

    return _config(Flux1Config, fields, flavors, axes_dim=(16, 56, 56), theta=10_000)


def flux2(shapes: Shapes, flavors: Mapping[str, Flux2Config]) -> Flux2Config | None:
    """The config of a FLUX.2 transformer; None if the shapes do not tell."""

    def fields() -> dict[str, Any]:
        return {**_fields(shapes), "use_guidance_embed": "guidance_in.in_layer.weight" in shapes}

    return _config(Flux2Config, fields, flavors, axes_dim=(32, 32, 32, 32), theta=2000)


def _fields(shapes: Shapes) -> dict[str, Any]:
    """What both families have; an error where a parameter is not there, or of no model's shape."""
    hidden, in_channels = shapes["img_in.weight"]
    # The last linear of an MLP has as many columns as the MLP is wide; a single block's, attention's first.
    mlp_hidden = (shapes.get("double_blocks.0.img_mlp.2.weight") or (0, 0))[1]
    mlp_hidden = mlp_hidden or shapes["single_blocks.0.linear2.weight"][1] - hidden
    norm = (
        shapes.get("double_blocks.0.img_attn.norm.query_norm.scale")
        or shapes["single_blocks.0.norm.query_norm.scale"]
    )
    return {
        "in_channels": in_channels,
        "context_in_dim": shapes["txt_in.weight"][1],
        "hidden_size": hidden,
        "mlp_ratio": ratio(mlp_hidden, hidden),
        "num_heads": hidden // norm[0],
        "depth": _blocks(shapes, "double_blocks"),
        "depth_single_blocks": _blocks(shapes, "single_blocks"),
    }


def _config(
    kind: Callable[..., Any], fields: Callable[[], dict[str, Any]], flavors: Mapping[str, Any], **rotary: Any
) -> Any | None:
    try:
        found = fields()
        if found["hidden_size"] == found["num_heads"] * _HEAD:
            return kind(**found, **rotary)
    except (LookupError, ValueError, ZeroDivisionError):  # a tensor is missing, or of no model's shape
        return None
    for flavor in flavors.values():
        if all(getattr(flavor, name) == value for name, value in found.items()):
            return flavor
    return None


def ratio(mlp_hidden: int, hidden: int) -> float:
    """An MLP's width as a config says it: the models take int(hidden * ratio), so a ratio that was rounded
    down, as 15 / 22 is, would make it one too narrow."""
    exact = mlp_hidden / hidden
    return exact if int(hidden * exact) == mlp_hidden else math.nextafter(exact, math.inf)


def _blocks(shapes: Shapes, kind: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})
