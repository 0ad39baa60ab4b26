"""The model on a mesh as a function: what training, validation and the sampler call.

Latents go in and come out whole, on every rank that works on the same samples; in between, the mesh may share
out tokens (context parallelism) and blocks (pipeline).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flux_trainer.config.schema import JobConfig
from flux_trainer.encoders.choose import TextEncoder
from flux_trainer.encoders.text import Shard
from flux_trainer.flow.latents import SPACES, References
from flux_trainer.models.attention import Lengths
from flux_trainer.models.configs import ModelConfig
from flux_trainer.models.model import Arguments
from flux_trainer.models.registry import model_class
from flux_trainer.models.widths import misfit
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.group import shares
from flux_trainer.parallel.mesh import Mesh
from flux_trainer.runtime import peers


class Velocity:
    """A FLUX model's velocity field, computed by a mesh. Latents are [B, *space.shape(height, width)]."""

    def __init__(self, parallel: Parallel, config: ModelConfig, device: torch.device) -> None:
        self.parallel = parallel
        self.config = config
        self.device = device
        self.space = SPACES[config.family]
        self._by_name = model_class(config).arguments

    def arguments(
        self,
        x_t: Tensor,
        t: Tensor,
        txt: Tensor,
        vec: Tensor | None,
        guidance: Tensor | None,
        references: References | None = None,
    ) -> Arguments:
        """The model's arguments; under context parallelism with this rank's part of the tokens.

        Args:
            x_t: [B, C, h, w], noisy latents.
            t: [B], in [0, 1].
            txt: [B, T, D], the caption's tokens.
            vec: [B, D'], the pooled caption, of families that have one.
            guidance: [B], distilled guidance such as 3.5; models without its embedding take no notice.
            references: images that the samples refer to. Their tokens follow those of x_t.
        """
        size, _, height, width = x_t.shape
        img = self.space.pack(x_t)  # [B, L, .]
        img_ids = self.space.image_ids(size, height, width, self.device)
        txt_ids = self.space.text_ids(size, txt.shape[1], self.device)
        lengths = None
        if references:
            lengths = self._lengths(txt.shape[1], img.shape[1], references)
        if context := self.parallel.context:
            room = context.padded(references.tokens.shape[1]) if references else 0
            context.begin(txt.shape[1], img.shape[1], room)
            img, img_ids, txt, txt_ids = context.split(img, img_ids, txt, txt_ids)
        if references:
            tokens, ids = references.tokens, references.ids  # [B, R, .]
            if context:
                tokens, ids = context.split_padded(references.counts, tokens, ids)
            img, img_ids = torch.cat((img, tokens), dim=1), torch.cat((img_ids, ids), dim=1)
        by_name = self._by_name(
            image=img,
            image_ids=img_ids,
            text=txt,
            text_ids=txt_ids,
            timesteps=t,
            pooled=vec,
            guidance=guidance if self.config.guidance_embed else None,
        )
        return {**by_name, "lengths": lengths} if lengths else by_name

    def _lengths(self, text: int, image: int, references: References) -> Lengths | None:
        """What counts of each sample, on each rank of those that share its tokens; None if all does."""
        ranks = self.parallel.context.size if self.parallel.context else 1
        whole = references.tokens.shape[1]
        if whole % ranks == 0 and all(count == whole for count in references.counts):
            return None
        rest = [a + b for a, b in zip(shares(text, ranks), shares(image, ranks), strict=True)]
        return tuple(
            tuple(a + b for a, b in zip(rest, shares(count, ranks), strict=True))
            for count in references.counts
        )

    def of_image(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Of the model's output [B, L, C], this rank's tokens of latents of that height and width: without
        those of references."""
        count = (height // self.space.patch) * (width // self.space.patch)
        context = self.parallel.context
        return tokens[:, : shares(count, context.size)[context.rank] if context else count]

    @torch.no_grad()
    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        txt: Tensor,
        vec: Tensor | None,
        guidance: Tensor | None,
        references: References | None = None,
    ) -> Tensor:
        """The whole velocity [B, C, h, w] in the model's compute dtype, without gradients.

        Arguments as in `arguments`.
        """
        peers.mark()
        height, width = x_t.shape[2:]
        arguments = self.arguments(x_t, t, txt, vec, guidance, references)
        if self.parallel.pipeline:
            tokens = self.parallel.pipeline.predict(arguments)
        else:
            (model,) = self.parallel.parts
            tokens = model(**arguments)
        tokens = self.of_image(tokens, height, width)
        if self.parallel.context:
            patch = self.space.patch
            tokens = self.parallel.context.gather(tokens, (height // patch) * (width // patch))
        return self.space.unpack(tokens, height, width)


def check_features(config: JobConfig, text: TextEncoder, model: ModelConfig) -> None:
    """Raises ValueError if the text encoders' features do not fit the transformer."""
    tokens_of = {"flux1": "t5_encoder", "flux2": "llm_encoder"}[model.family]
    for key, got, want in (
        (tokens_of, text.txt_dim, model.context_in_dim),
        ("clip_encoder", text.vec_dim or 0, model.vec_in_dim),
    ):
        if got != want:
            raise ValueError(misfit(config, key, got, want))


def shared_encoder(mesh: Mesh) -> Shard:
    """How the ranks that share one copy of FLUX share its large text encoder: T5-XXL is a third of FLUX.1."""

    def share(encoder: nn.Module, blocks: list[nn.Module]) -> None:
        if mesh.model:
            shard(encoder, blocks, mesh.model)

    return share
