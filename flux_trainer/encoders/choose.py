"""The text encoders that belong to a kind of FLUX."""

from __future__ import annotations

from typing import Literal

import torch

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.chat import CHATS
from flux_trainer.encoders.llm import LLMEncoder
from flux_trainer.encoders.text import Shard, TextEncoders
from flux_trainer.models.configs import ModelConfig

Kind = Literal["flux1", "flux2-dev", "flux2-klein"]

TextEncoder = TextEncoders | LLMEncoder


def kind_of(model: ModelConfig) -> Kind:
    """Which text encoders a model was made for. Of FLUX.2's, dev takes guidance, klein does not."""
    if model.family == "flux1":
        return "flux1"
    return "flux2-dev" if model.guidance_embed else "flux2-klein"


def text_encoders(
    section: Encoder,
    kind: Kind,
    device: torch.device,
    seed: int,
    shard: Shard | None = None,
    context_in_dim: int | None = None,
) -> TextEncoder:
    """T5 and CLIP for FLUX.1, Mistral for FLUX.2 dev, Qwen3 for FLUX.2 klein; one interface.

    Arguments and errors as of `TextEncoders` and `LLMEncoder`; `context_in_dim` is for the latter.
    """
    if kind == "flux1":
        return TextEncoders(section, device, seed, shard)
    return LLMEncoder(section, CHATS[kind], device, seed, shard, context_in_dim)
