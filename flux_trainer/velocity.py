"""The model on a mesh as a function: what training, validation and the sampler call.

Latents go in and come out whole, on every rank that works on the same samples; in between, the mesh may share
out tokens (context parallelism) and blocks (pipeline).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flux_trainer.config.schema import JobConfig
from flux_trainer.encoders.text import Shard, TextEncoders
from flux_trainer.flow.latents import image_ids, pack, text_ids, unpack
from flux_trainer.models.configs import Flux1Config
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.mesh import Mesh


class Velocity:
    """FLUX.1's velocity field, computed by a mesh."""

    def __init__(self, parallel: Parallel, config: Flux1Config, device: torch.device) -> None:
        self.parallel = parallel
        self.config = config
        self.device = device

    def arguments(
        self, x_t: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The model's arguments; under context parallelism with this rank's part of the tokens.

        Args:
            x_t: [B, 16, H/8, W/8], noisy latents.
            t: [B], in [0, 1].
            txt: [B, T, C], T5's features.
            vec: [B, D], CLIP's pooled features.
            guidance: [B], distilled guidance such as 3.5; models without its embedding take no notice.
        """
        size, _, height, width = x_t.shape
        img, img_ids = pack(x_t), image_ids(size, height, width, self.device)  # [B, L, 64], [B, L, 3]
        txt_ids = text_ids(size, txt.shape[1], self.device)
        if context := self.parallel.context:
            context.begin(txt.shape[1], img.shape[1])
            img, img_ids, txt, txt_ids = context.split(img, img_ids, txt, txt_ids)
        return {
            "img": img,
            "img_ids": img_ids,
            "txt": txt,
            "txt_ids": txt_ids,
            "timesteps": t,
            "y": vec,
            "guidance": guidance if self.config.guidance_embed else None,
        }

    @torch.no_grad()
    def __call__(self, x_t: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor | None) -> Tensor:
        """The whole velocity [B, 16, H/8, W/8] in the model's compute dtype, without gradients.

        Arguments as in `arguments`.
        """
        height, width = x_t.shape[2:]
        arguments = self.arguments(x_t, t, txt, vec, guidance)
        if self.parallel.pipeline:
            tokens = self.parallel.pipeline.predict(arguments)
        else:
            (model,) = self.parallel.parts
            tokens = model(**arguments)
        if self.parallel.context:
            tokens = self.parallel.context.gather(tokens, (height // 2) * (width // 2))
        return unpack(tokens, height, width)


def check_features(config: JobConfig, text: TextEncoders, model: Flux1Config) -> None:
    """Raises ValueError if the text encoders' features do not fit the transformer."""
    for key, got, want in (
        ("t5_encoder", text.txt_dim, model.context_in_dim),
        ("clip_encoder", text.vec_dim, model.vec_in_dim),
    ):
        if got != want:
            raise ValueError(
                f"encoder.{key} = {getattr(config.encoder, key)!r} gives {got} features, but "
                f"{config.model.flavor} takes {want}: choose the encoder that belongs to the flavor"
            )


def shared_encoder(mesh: Mesh) -> Shard:
    """How the ranks that share one copy of FLUX share T5: T5-XXL is as large as a third of FLUX."""

    def share(encoder: nn.Module, blocks: list[nn.Module]) -> None:
        if mesh.model.size() > 1:
            shard(encoder, blocks, mesh.model)

    return share
