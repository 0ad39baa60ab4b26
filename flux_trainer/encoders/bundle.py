"""The frozen half of the model: images and captions in, what the transformer trains on out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.choose import Kind, text_encoders
from flux_trainer.encoders.text import Shard
from flux_trainer.flow.latents import SPACES, LatentSpace
from flux_trainer.hub.autoencoder import load_autoencoder
from flux_trainer.models.autoencoder import AutoEncoderSizes


@dataclass(frozen=True)
class Encoded:
    """B encoded samples."""

    latents: Tensor
    """Normalised latents of the autoencoder: [B, 16, H/8, W/8], for FLUX.2 [B, 128, H/16, W/16]."""
    txt: Tensor
    """[B, L, C]: the caption's tokens."""
    vec: Tensor | None
    """[B, D]: CLIP's pooled features; FLUX.2 has none."""
    references: list[list[Tensor]] = field(default_factory=list)
    """Latents [C, h, w] of each sample's reference images; empty if no sample has one."""

    def map(self, change: Callable[[Tensor], Tensor], references: list[list[Tensor]]) -> Encoded:
        """The record with `change` applied to every [B, ...], and with those references."""
        vec = None if self.vec is None else change(self.vec)
        return Encoded(change(self.latents), change(self.txt), vec, references)

    def rows(self, part: slice) -> Encoded:
        """Some of the samples."""
        return self.map(lambda x: x[part], self.references[part])

    @classmethod
    def cat(cls, parts: Sequence[Encoded]) -> Encoded:
        """The samples of several records one after another."""
        if len(parts) == 1:
            return parts[0]
        vecs = [p.vec for p in parts if p.vec is not None]
        return cls(
            torch.cat([p.latents for p in parts]),
            torch.cat([p.txt for p in parts]),
            torch.cat(vecs) if vecs else None,
            [images for p in parts for images in p.references],
        )


class Codec:
    """The frozen autoencoder: images as bytes to latents, and back."""

    def __init__(self, section: Encoder, device: torch.device, kind: Kind | None = None) -> None:
        """`kind`: whose latents they must be.

        Raises FileNotFoundError or ValueError where `section.autoencoder_path` holds no such autoencoder.
        """
        self.device = device
        self.dtype: torch.dtype = getattr(torch, section.autoencoder_dtype)
        # Bytes become [-1, 1] and back in this dtype: bfloat16 would blur them.
        self._wide = torch.promote_types(self.dtype, torch.float32)
        autoencoder = load_autoencoder(section.autoencoder_path, self.dtype)
        if kind is not None:
            _check_latents(section, autoencoder.config, SPACES[kind.partition("-")[0]])
        self.autoencoder = autoencoder.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] (`LatentSpace.shape`) of uint8 [B, 3, H, W], in the autoencoder's dtype.

        With `noise` (standard normal, of the latents' shape) they are drawn from the posterior, without it
        they are its mean.
        """
        image = images.to(self.device, non_blocking=True).to(self._wide) / 127.5 - 1.0  # [0, 255] -> [-1, 1]
        if noise is not None:
            noise = noise.to(self.device, self.dtype)
        return self.autoencoder.encode(image.to(self.dtype), noise)

    def encode_references(self, images: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The mean latents [C, h, w] of each sample's reference images, uint8 [3, H, W] of any sizes.

        Images of one size are encoded together, at most as many as there are samples.
        """
        alike: dict[torch.Size, list[tuple[int, int]]] = {}  # by size: (sample, number of its image)
        for i, sample in enumerate(images):
            for k, image in enumerate(sample):
                alike.setdefault(image.shape, []).append((i, k))
        latents = [[torch.empty(0)] * len(sample) for sample in images]
        for places in alike.values():
            for start in range(0, len(places), len(images)):
                part = places[start : start + len(images)]
                encoded = self.encode_images(torch.stack([images[i][k] for i, k in part]))
                for (i, k), x in zip(part, encoded, strict=True):
                    latents[i][k] = x
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] of normalised latents [B, C, h, w]; clamped to [-1, 1]."""
        image = self.autoencoder.decode(latents.to(self.device, self.dtype)).to(self._wide)
        return ((image.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def _check_latents(section: Encoder, config: AutoEncoderSizes, space: LatentSpace) -> None:
    """Raise ValueError unless the autoencoder's latents are those that the transformer takes."""
    got, want = (config.latent_channels, config.downsampling), (space.channels, space.pixels)
    if got != want:
        raise ValueError(
            f"encoder.autoencoder_path = {section.autoencoder_path!r} gives latents of {got[0]} channels at "
            f"1/{got[1]} of the size, but the transformer takes {want[0]} at 1/{want[1]}: choose the "
            "autoencoder that belongs to the flavor (FLUX.2 has one of its own)."
        )


class Encoders(Codec):
    """The autoencoder and the text encoders, frozen."""

    def __init__(
        self,
        section: Encoder,
        device: torch.device,
        seed: int,
        shard: Shard | None = None,
        kind: Kind = "flux1",
        context_in_dim: int | None = None,
    ) -> None:
        """See `text_encoders` for the arguments and the errors."""
        super().__init__(section, device, kind)
        self.text = text_encoders(section, kind, device, seed, shard, context_in_dim)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        ids: Mapping[str, Tensor],
        drop_t5: Tensor,
        drop_clip: Tensor,
        noise: Tensor | None = None,
        references: Sequence[Sequence[Tensor]] = (),
    ) -> Encoded:
        """Encode images (uint8 [B, 3, H, W]) and tokenized captions, dropped where the flags [B] say so
        (FLUX.2's one encoder goes by `drop_t5`).

        `noise` as in `encode_images`, `references` as in `encode_references`.
        """
        features = self.text.drop(self.text.encode(ids), drop_t5, drop_clip)
        latents, shown = self.encode_images(images, noise), self.encode_references(references)
        return Encoded(latents, features.txt, features.vec, shown)
