"""What the frozen encoders take of a rank's memory, from their configs alone.

No weights are read and transformers is not imported. Where a text encoder's config.json is not on this
machine, it is taken for FLUX.1's: T5 1.1 XXL, CLIP ViT-L/14.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_trainer.config.schema import Encoder
from flux_trainer.hub.autoencoder import read_config
from flux_trainer.models.autoencoder import AutoEncoder
from flux_trainer.runtime.live_bytes import LiveBytes, fill_fake

T5_XXL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "max_position_embeddings": 77,
}

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank."""

    t5: int
    """Its share of the weights."""
    clip: int
    autoencoder: int
    encoding: int
    """What encoding a local batch takes at its peak: the autoencoder's activations, or T5's gathered weights
    (its activations are not counted)."""
    assumed: tuple[str, ...]
    """Those of t5, clip whose config.json is not here."""

    @property
    def weights(self) -> int:
        return self.t5 + self.clip + self.autoencoder


def footprint(section: Encoder, ranks: int, batch: int, img_size: int) -> Footprint:
    """Of the encoders in `section`, T5 shared by `ranks`, encoding `batch` images of side `img_size`."""
    size = getattr(torch, section.dtype).itemsize
    t5, clip = _config(section.t5_encoder), _config(section.clip_encoder)
    root, block, bias = t5_shapes(t5 or T5_XXL)
    layers: int = (t5 or T5_XXL)["num_layers"]

    def share(shapes: Shapes) -> int:
        return sum(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in shapes)

    dtype = getattr(torch, section.autoencoder_dtype)
    with torch.device("meta"):
        autoencoder = AutoEncoder(read_config(section.autoencoder_path))
    gathered = (sum(map(prod, root)) + 2 * sum(map(prod, block))) * size if ranks > 1 else 0
    with FakeTensorMode(), torch.no_grad(), LiveBytes() as live:
        fill_fake(autoencoder, dtype)
        before = live.now
        live.peak = before
        autoencoder.encode(torch.empty(batch, 3, img_size, img_size, dtype=dtype))
        activity = live.peak - before
    return Footprint(
        t5=(share(root) + layers * share(block) + share(bias)) * size,
        clip=sum(map(prod, clip_shapes(clip or CLIP_L))) * size,
        autoencoder=sum(p.numel() for p in autoencoder.parameters()) * dtype.itemsize,
        encoding=max(activity, gathered),
        assumed=tuple(name for name, found in (("t5", t5), ("clip", clip)) if found is None),
    )


def t5_shapes(config: dict[str, Any]) -> tuple[Shapes, Shapes, Shapes]:
    """Shapes of the encoder's parameters: those outside the blocks, those of a block, and what the first
    block has beside."""
    d, ff, inner = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    wide = 2 if config["feed_forward_proj"].startswith("gated") else 1
    block = [(inner, d)] * 3 + [(d, inner), (d,)] + [(ff, d)] * wide + [(d, ff), (d,)]
    return (
        [(config["vocab_size"], d), (d,)],
        block,
        [(config["relative_attention_num_buckets"], config["num_heads"])],
    )


def clip_shapes(config: dict[str, Any]) -> Shapes:
    """Shapes of the text model's parameters."""
    h, mlp = config["hidden_size"], config["intermediate_size"]
    layer = [(h, h), (h,)] * 4 + [(h,)] * 4 + [(mlp, h), (mlp,), (h, mlp), (h,)]
    embeddings = [(config["vocab_size"], h), (config["max_position_embeddings"], h)]
    return [*embeddings, *layer * config["num_hidden_layers"], (h,), (h,)]


def _config(spec: str) -> dict[str, Any] | None:
    path = Path(spec).expanduser() / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
