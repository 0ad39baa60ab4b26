"""What the frozen encoders take of a rank's memory, from their configs alone.

No weights are read and transformers is not imported. Where a text encoder's config.json is not on this
machine, it is taken for the published one: T5 1.1 XXL and CLIP ViT-L/14 for FLUX.1; for FLUX.2 the language
model of the width that the transformer takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.chat import CHATS, QWEN3, Chat
from flux_trainer.encoders.choose import Kind
from flux_trainer.hub.autoencoder import build, read_config
from flux_trainer.hub.detect import read_json
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2Config
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

LANGUAGE_MODELS: dict[int, dict[str, Any]] = {
    hidden: {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    for hidden, intermediate, vocabulary in (
        (5120, 32768, 131072),  # Mistral-Small-3.2
        (2560, 9728, 151936),  # Qwen3-4B
        (4096, 12288, 151936),  # Qwen3-8B
    )
}
"""By width: what FLUX.2 dev, klein 4B and klein 9B read."""

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank."""

    t5: int
    """Its share of the weights."""
    clip: int
    llm: int
    """The language model's share of the weights, in place of T5's and CLIP's for FLUX.2."""
    autoencoder: int
    encoding: int
    """What encoding a local batch takes at its peak: the autoencoder's activations, or gathered weights of
    T5 or the language model (their activations are not counted)."""
    assumed: tuple[str, ...]
    """Those of t5, clip, llm whose config.json is not here."""

    @property
    def weights(self) -> int:
        return self.t5 + self.clip + self.llm + self.autoencoder


def footprint(
    section: Encoder, ranks: int, batch: int, img_size: int, kind: Kind = "flux1", context_in_dim: int = 0
) -> Footprint:
    """Of the encoders in `section`, the large one shared by `ranks`, for images of side `img_size`.

    Args:
        batch: images that are encoded at the same time.
        kind: whose encoders.
        context_in_dim: features of a text token of FLUX.2; FLUX.1's encoders have known defaults.

    Raises:
        ValueError: FLUX.2's language model is neither here nor known by its width.
    """
    size = getattr(torch, section.dtype).itemsize
    text = _flux1(section, ranks) if kind == "flux1" else _flux2(section, ranks, CHATS[kind], context_in_dim)
    dtype = getattr(torch, section.autoencoder_dtype)
    with torch.device("meta"):
        published = AutoEncoderConfig() if kind == "flux1" else AutoEncoder2Config()
        autoencoder = build(read_config(section.autoencoder_path, published))
    with FakeTensorMode(), torch.no_grad(), LiveBytes() as live:
        fill_fake(autoencoder, dtype)
        before = live.now
        live.peak = before
        autoencoder.encode(torch.empty(batch, 3, img_size, img_size, dtype=dtype))
        activity = live.peak - before
    return Footprint(
        **{name: size * text.shares.get(name, 0) for name in ("t5", "clip", "llm")},
        autoencoder=sum(p.numel() for p in autoencoder.parameters()) * dtype.itemsize,
        encoding=max(activity, text.gathered * size if ranks > 1 else 0),
        assumed=text.assumed,
    )


class _Text(NamedTuple):
    """Text encoders, in elements."""

    shares: dict[str, int]
    """What a rank holds of each."""
    gathered: int
    """The most that is whole at a time where they are shared: two blocks, and what stays whole."""
    assumed: tuple[str, ...]


def _flux1(section: Encoder, ranks: int) -> _Text:
    t5, clip = _config(section.t5_encoder), _config(section.clip_encoder)
    root, block, bias = t5_shapes(t5 or T5_XXL)
    layers: int = (t5 or T5_XXL)["num_layers"]
    shares = {
        "t5": _share(root, ranks) + layers * _share(block, ranks) + _share(bias, ranks),
        "clip": _share(clip_shapes(clip or CLIP_L), 1),
    }
    assumed = tuple(name for name, found in (("t5", t5), ("clip", clip)) if found is None)
    return _Text(shares, _share(root, 1) + 2 * _share(block, 1), assumed)


def _flux2(section: Encoder, ranks: int, chat: Chat, context_in_dim: int) -> _Text:
    config = _config(section.llm_encoder)
    table, layer = llm_shapes(config or _language_model(context_in_dim // len(chat.states)), chat)
    share = _share(table, ranks) + chat.states[-1] * _share(layer, ranks)
    gathered = max(_share(table, 1), 2 * _share(layer, 1))
    return _Text({"llm": share}, gathered, () if config else ("llm",))


def _share(shapes: Shapes, ranks: int) -> int:
    """Elements of a rank's part of them; FSDP cuts the first dimension."""
    return sum(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in shapes)


def _language_model(width: int) -> dict[str, Any]:
    if width not in LANGUAGE_MODELS:
        raise ValueError(
            f"encoder.llm_encoder has no config.json here, and no language model of FLUX.2 has width "
            f"{width}: name the folder of the one that belongs to the flavor."
        )
    return LANGUAGE_MODELS[width]


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


def llm_shapes(config: dict[str, Any], chat: Chat) -> tuple[Shapes, Shapes]:
    """Shapes of the parameters of a language model as FLUX.2 reads it: the token table, and a layer."""
    config = config.get("text_config", config)  # Mistral 3 has a vision tower beside it
    d, ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or d // heads
    q, kv = heads * head, config["num_key_value_heads"] * head
    layer = [(q, d), (kv, d), (kv, d), (d, q), (ff, d), (ff, d), (d, ff), (d,), (d,)]
    norms = [(head,), (head,)] if chat is QWEN3 else []  # of queries and keys
    return [(config["vocab_size"], d)], layer + norms


def _config(spec: str) -> dict[str, Any] | None:
    path = Path(spec).expanduser() / "config.json"
    if not spec or not path.is_file():
        return None
    return read_json(path)
