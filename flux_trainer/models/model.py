"""What the models of all families have in common: embedders, then blocks, then a head.

That, and a state that goes from one to the next, is all that checkpointing, compilation, sharding and
pipelines go by. A family adds its embedders, the names of its arguments, and what modulates its blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flux_trainer.models.attention import Lengths
from flux_trainer.models.configs import TIME_DIM, ModelConfig
from flux_trainer.models.init import Constant, Distribution, Normal, Rows, xavier_uniform
from flux_trainer.models.layers import FusedLinear, LastLayer, MLPEmbedder
from flux_trainer.models.sinusoids import rope_table, timestep_embedding

State = tuple[Tensor, ...]
"""What goes from block to block: img [B, L_img, h], txt [B, L_txt, h], vec [B, h], which the head takes, and
what else a family modulates its blocks with, [B, n h] each."""

Arguments = Mapping[str, Tensor | Lengths | None]
"""Of a model's `forward`, by name, without `state`."""


class FluxModel(nn.Module):
    """The velocity field of a FLUX model, for tokens."""

    HEAD: ClassVar[tuple[str, ...]] = ("final_layer",)
    """The children that come after the blocks; all other children but the blocks come before them."""

    config: ModelConfig
    double_blocks: nn.ModuleList
    single_blocks: nn.ModuleList
    final_layer: LastLayer | None
    time_in: MLPEmbedder
    guidance_in: MLPEmbedder | None

    @abstractmethod
    def forward(self, **inputs: Any) -> Tensor | State:
        """Velocity [B, L_img, channels] in the weights' dtype.

        With `lengths`, text and image tokens together count for so many; the rest, at the end of the image
        tokens, is padding, and what comes of it means nothing.

        Of a model that was cut into stages (`parallel/cut.py`), all but the first go on from `state`, what
        the stage before returned, and all but the last return theirs.
        """

    @staticmethod
    @abstractmethod
    def arguments(
        *,
        image: Tensor,
        image_ids: Tensor,
        text: Tensor,
        text_ids: Tensor,
        timesteps: Tensor,
        pooled: Tensor | None,
        guidance: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The arguments of `forward` by its own names; `lengths` and `state` are called so by all.

        image [B, L_img, in_channels], text [B, L_txt, context_in_dim], positions [B, L, axes] of both,
        timesteps [B], the pooled caption [B, vec_in_dim] where the family takes one, and guidance [B].
        """

    @abstractmethod
    def modulations(self, state: State) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What double-stream and single-stream blocks take between the tokens and the positions."""

    def run(self, state: State, ids: Tensor, lengths: Lengths | None = None) -> Tensor | State:
        """The blocks and the head, from `state` and the positions [B, L_txt + L_img, axes] on."""
        img, txt, vec, *_ = state
        shapes = tuple(vec.new_empty(0, *each) for each in lengths or ())
        of_double, of_single = self.modulations(state)
        pe = rope_table(ids, self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, *of_double, pe, *shapes)
        tokens = torch.cat((txt, img), dim=1)  # [B, L_txt + L_img, h]
        for block in self.single_blocks:
            tokens = block(tokens, *of_single, pe, *shapes)
        txt, img = tokens.split((txt.shape[1], img.shape[1]), dim=1)
        return (img, txt, *state[2:]) if self.final_layer is None else self.final_layer(img, vec)

    def condition(self, timesteps: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Timestep and guidance [B] as one vector [B, h] in `dtype`, that of the weights.

        Raises:
            ValueError: the model embeds guidance, and got none.
        """
        vec: Tensor = self.time_in(timestep_embedding(timesteps, TIME_DIM).to(dtype))
        if self.guidance_in is None:
            return vec
        if guidance is None:
            field = next(f.name for f in fields(self.config) if f.name.endswith("guidance_embed"))
            raise ValueError(
                f"This model has a guidance embedding ({field} = true) and got guidance=None; pass a tensor "
                "[B] with one value per sample."
            )
        return vec + self.guidance_in(timestep_embedding(guidance, TIME_DIM).to(dtype))

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of the double-stream blocks, then the single-stream blocks, in forward order."""
        for kind in ("double_blocks", "single_blocks"):
            for number, block in getattr(self, kind).named_children():
                yield f"{kind}.{number}", block

    def init_distributions(self) -> dict[str, Distribution]:
        """Initial values by parameter name, in the manner of DiT.

        Modulations and the final layer start at zero (each block is the identity), the embedders of the
        conditioning at N(0, 0.02), other matrices at Xavier's bound for each section on its own, biases at
        zero, norm scales at one.
        """
        distributions: dict[str, Distribution] = {}
        for name, parameter in self.named_parameters():
            owner = self.get_submodule(name.rpartition(".")[0])
            if name.endswith(".scale"):
                distributions[name] = Constant(1.0)
            elif name.endswith(".bias") or "mod" in name or name.startswith("final_layer."):
                distributions[name] = Constant(0.0)
            elif name.startswith(("time_in.", "guidance_in.", "vector_in.")):
                distributions[name] = Normal(0.02)
            elif isinstance(owner, FusedLinear) and len(owner.rows) > 1:
                fan_in = owner.in_features
                sections = tuple((rows, xavier_uniform(fan_in, rows)) for rows in owner.rows.values())
                distributions[name] = Rows(sections)
            else:
                distributions[name] = xavier_uniform(parameter.shape[1], parameter.shape[0])
        return distributions
