"""FLUX.1's text encoders, frozen: T5 gives the token sequence `txt`, CLIP's pooled output the vector `vec`.

Both run without an attention mask, as in BFL's code: padding takes part. A dropped caption (classifier-free
guidance) becomes the *empty prompt's* features, never zeros: the sampler asks the model for exactly those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.locate import HINTS, locate
from flux_trainer.encoders.tokenizers import Tokenizers
from flux_trainer.encoders.weights import WEIGHT_FILES, Checkpoint, Values, build, fill, random_values

Shard = Callable[[nn.Module, list[nn.Module]], None]
"""Shards a module in place, block by block: called with a text encoder and the list of its blocks."""


@dataclass(frozen=True)
class TextFeatures:
    """What the transformer sees of B captions."""

    txt: Tensor
    """[B, L, C]: T5's last hidden states; for FLUX.2 three of a language model, side by side."""
    vec: Tensor | None
    """[B, D]: CLIP's pooled output; FLUX.2 has none."""


class TextEncoders:
    """T5 and CLIP with their tokenizers, and the features of the empty prompt.

    A sharded T5 communicates in every call: all ranks must make the same number of calls of `encode`.
    """

    def __init__(self, section: Encoder, device: torch.device, seed: int, shard: Shard | None = None) -> None:
        """Build, shard (T5 only: CLIP is small), fill; encode the empty prompt, once on every rank.

        Args:
            seed: determines the weights under `section.random_init`; unused otherwise.
            shard: applied to T5 while it is on the meta device; None: T5 is whole on every rank.

        Raises:
            FileNotFoundError: a file is missing; the message names it and the command that brings it.
            ValueError: the weights do not fit config.json.
        """
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        self.device = device
        self.tokenizers = Tokenizers(section)
        dtype: torch.dtype = getattr(torch, section.dtype)

        t5_folder, t5_values = source("t5", section.t5_encoder, section.random_init)
        t5_config = T5Config.from_pretrained(t5_folder, local_files_only=True)
        check_vocabulary("t5", self.tokenizers.t5, t5_config.vocab_size)
        self.t5 = build(lambda: T5EncoderModel(t5_config), dtype)
        if shard is not None:
            shard(self.t5, list(self.t5.encoder.block))
        fill(self.t5, t5_values or random_values(seed, device, query_scale=t5_config.d_kv**-0.5), device)

        clip_folder, clip_values = source("clip", section.clip_encoder, section.random_init)
        clip_config = CLIPTextConfig.from_pretrained(clip_folder, local_files_only=True)
        check_vocabulary("clip", self.tokenizers.clip, clip_config.vocab_size)
        self.clip = build(lambda: CLIPTextModel(clip_config), dtype)
        fill(self.clip, clip_values or random_values(seed, device), device)

        self.txt_dim: int = t5_config.d_model
        self.vec_dim: int = clip_config.hidden_size
        self.empty = self.encode(self.tokenize([""]))

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Ids of B captions: `t5` [B, max_t5_encoding_len] and `clip` [B, 77], int64, on the CPU."""
        return self.tokenizers.tokenize(captions)

    @torch.no_grad()
    def encode(self, ids: Mapping[str, Tensor]) -> TextFeatures:
        """Features of tokenized captions (see `tokenize`), in the encoders' dtype, on their device."""
        txt = self.t5(input_ids=ids["t5"].to(self.device, non_blocking=True)).last_hidden_state
        if hasattr(self.t5, "reshard"):  # FSDP's root waits for a backward that never comes
            self.t5.reshard()
        vec = self.clip(input_ids=ids["clip"].to(self.device, non_blocking=True)).pooler_output
        return TextFeatures(txt, vec)

    def drop(self, features: TextFeatures, drop_t5: Tensor, drop_clip: Tensor) -> TextFeatures:
        """`features` with the rows flagged in `drop_t5`, `drop_clip` (bool [B]) as for the empty prompt."""
        drop_t5 = drop_t5.to(self.device, non_blocking=True)
        drop_clip = drop_clip.to(self.device, non_blocking=True)
        assert features.vec is not None
        assert self.empty.vec is not None
        return TextFeatures(
            torch.where(drop_t5[:, None, None], self.empty.txt, features.txt),  # [B, L, C]
            torch.where(drop_clip[:, None], self.empty.vec, features.vec),  # [B, D]
        )


def source(name: Literal["t5", "clip", "llm"], spec: str, random_init: bool) -> tuple[Path, Values | None]:
    """The folder of an encoder, and its stored weights (None: to be drawn at random)."""
    key, hint = f"encoder.{name}_encoder", HINTS[name]
    folder = locate(spec, key, ("config.json",) if random_init else WEIGHT_FILES, hint)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"No config.json in {folder.absolute()} ({key} = {spec!r}). {hint}")
    return folder, None if random_init else Checkpoint(folder, name, f"{key} = {spec!r}", hint)


def check_vocabulary(name: str, tokenizer: object, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer has more tokens than the encoder's table."""
    size = len(tokenizer)  # type: ignore[arg-type]
    if size > vocab_size:
        raise ValueError(
            f"The {name.upper()} tokenizer has {size} tokens, but the encoder's config.json says vocab_size "
            f"{vocab_size}: encoder.{name}_tokenizer and encoder.{name}_encoder do not belong together."
        )
