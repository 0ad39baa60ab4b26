"""Which flavor weights on disk are of, by what their files say of themselves. No torch.

Shapes in a file's header and a config beside them are brought to the names of our configs' fields; a flavor
fits that has all of these values. Whether every tensor is there, `hub` sees when it opens the files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flux_trainer.models.registry import FLAVORS

Shapes = Mapping[str, Sequence[int]]

DIFFUSERS = {"FluxTransformer2DModel": "flux1", "Flux2Transformer2DModel": "flux2"}
"""diffusers' class -> family."""
_FIELDS = {
    "in_channels": "in_channels",
    "num_layers": "depth",
    "num_single_layers": "depth_single_blocks",
    "attention_head_dim": "head_dim",
    "num_attention_heads": "num_heads",
    "joint_attention_dim": "context_in_dim",
    "pooled_projection_dim": "vec_in_dim",
    "guidance_embeds": "guidance_embed",
    "axes_dims_rope": "axes_dim",
    "rope_theta": "theta",
    "mlp_ratio": "mlp_ratio",
}
"""Field of diffusers' config.json -> ours. Those that are not written show in the shapes."""

_KNOWN_VARIANTS = {("flux1", 384): "FLUX.1-Fill", ("flux1", 128): "FLUX.1-Depth or FLUX.1-Canny"}
"""Family and in_channels of published models that take more than noise, and are no flavors."""

_PREFIX = re.compile(r"(model\.)?diffusion_model\.")  # ComfyUI's
_SIZES = (
    ("hidden_size", 0, ("img_in.weight", "x_embedder.weight")),
    ("in_channels", 1, ("img_in.weight", "x_embedder.weight")),
    ("context_in_dim", 1, ("txt_in.weight", "context_embedder.weight")),
    ("vec_in_dim", 1, ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")),
    (
        "head_dim",
        0,
        (
            "double_blocks.0.img_attn.norm.query_norm.scale",
            "double_blocks.0.img_attn.norm.query_norm.weight",
            "single_blocks.0.norm.query_norm.scale",
            "single_blocks.0.norm.query_norm.weight",
            "transformer_blocks.0.attn.norm_q.weight",
            "single_transformer_blocks.0.attn.norm_q.weight",
        ),
    ),
)
"""Field -> the dimension that shows it, of the first of these tensors that is there."""
_BLOCKS = {
    "depth": re.compile(r"(?:double|transformer)_blocks\.(\d+)\."),
    "depth_single_blocks": re.compile(r"(?:single|single_transformer)_blocks\.(\d+)\."),
}


def of_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields that the tensors of a transformer show, in any layout; empty where they are of no FLUX."""
    shapes = {_PREFIX.sub("", name, count=1): shape for name, shape in shapes.items()}
    fields: dict[str, Any] = {}
    for field, dim, names in _SIZES:
        shape = next((shapes[name] for name in names if name in shapes), ())
        if len(shape) > dim:
            fields[field] = shape[dim]
    if not {"hidden_size", "context_in_dim", "head_dim"} <= fields.keys():
        return {}
    if "vec_in_dim" in fields:
        fields["family"] = "flux1"
    elif any(name.startswith("double_stream_modulation_img.") for name in shapes):
        fields["family"] = "flux2"
    else:  # Chroma, for one, has FLUX.1's blocks without its vector
        return {}
    fields["guidance_embed"] = any("guidance_in." in n or "guidance_embedder." in n for n in shapes)
    for field, block in _BLOCKS.items():
        fields[field] = len({match[1] for name in shapes if (match := block.match(name))})
    return fields


def of_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a JSON object states: this trainer's note or diffusers' config.json; {} if neither."""
    if values.get("_class_name") in DIFFUSERS:
        known = {_FIELDS[name]: value for name, value in values.items() if name in _FIELDS}
        return {**known, "family": DIFFUSERS[values["_class_name"]]}
    if isinstance(values.get("config"), dict):
        return {**values["config"], "family": values.get("family")}
    return {}


def flavors(fields: Mapping[str, Any]) -> list[str]:
    """The flavors with these values."""
    return [flavor for flavor in FLAVORS if fields and not _differing(fields, flavor)]


def unlike(fields: Mapping[str, Any]) -> str:
    """In words, of fields that are no flavor's: what they describe, and what differs from the nearest."""
    what = f"{_describe(fields)}, which is no flavor"
    family = [name for name, config in FLAVORS.items() if config.family == fields.get("family")]
    if not family:
        return what
    nearest = min(family, key=lambda flavor: len(_differing(fields, flavor)))
    gaps = [f"{name} ({here}, not {there})" for name, here, there in _differing(fields, nearest)]
    known = _KNOWN_VARIANTS.get((fields["family"], fields.get("in_channels", 0)))
    variant = f", as {known} does, which is not supported" if known else ""
    return f"{what}: it differs from {nearest} in {', '.join(gaps)}{variant}"


def _differing(fields: Mapping[str, Any], flavor: str) -> list[tuple[str, Any, Any]]:
    """Field, value here and value of the flavor (None: it has no such field), where they are not equal."""
    wanted = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
    config = FLAVORS[flavor]
    return [(n, x, getattr(config, n, None)) for n, x in wanted.items() if getattr(config, n, None) != x]


def _describe(fields: Mapping[str, Any]) -> str:
    title = {"flux1": "FLUX.1", "flux2": "FLUX.2"}.get(fields.get("family", ""), "another model")
    sizes = [
        f"{name} {fields[name]}" for name in ("hidden_size", "depth", "depth_single_blocks") if name in fields
    ]
    return f"{title} with {', '.join(sizes)}" if sizes else title
