"""The FLUX.1 transformer: double-stream blocks with weights of their own for image and text tokens, then
single-stream blocks over both, all modulated by one vector made of timestep, guidance and pooled caption.

Parameter names, row order and arithmetic are Black Forest Labs'. Nothing here knows of training or of
several devices. Shapes: B samples, L tokens, h = hidden_size, H heads of D dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_trainer.models import blocks
from flux_trainer.models.attention import Lengths
from flux_trainer.models.configs import TIME_DIM, Flux1Config
from flux_trainer.models.layers import LastLayer, Linear, MLPEmbedder, Modulation
from flux_trainer.models.model import FluxModel, State


class DoubleStreamBlock(blocks.DoubleStreamBlock):
    """With modulations of its own."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__(config)
        self.img_mod = Modulation(config.hidden_size, triples=2)
        self.txt_mod = Modulation(config.hidden_size, triples=2)

    def forward(  # type: ignore[override]
        self, img: Tensor, txt: Tensor, silu_vec: Tensor, pe: Tensor, *lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """img [B, L_img, h], txt [B, L_txt, h], silu(vec) [B, h], pe (text, then image) -> img, txt."""
        return super().forward(img, txt, self.img_mod(silu_vec), self.txt_mod(silu_vec), pe, *lengths)


class SingleStreamBlock(blocks.SingleStreamBlock):
    """With a modulation of its own."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__(config)
        self.modulation = Modulation(config.hidden_size, triples=1)

    def forward(self, x: Tensor, silu_vec: Tensor, pe: Tensor, *lengths: Tensor) -> Tensor:
        """x [B, L, h] (text, then image), silu(vec) [B, h], pe -> x."""
        return super().forward(x, self.modulation(silu_vec), pe, *lengths)


class Flux1Model(FluxModel):
    """The velocity field of FLUX.1, for packed latents."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, h)
        self.time_in = MLPEmbedder(TIME_DIM, h)
        self.vector_in = MLPEmbedder(config.vec_in_dim, h)
        self.guidance_in = MLPEmbedder(TIME_DIM, h) if config.guidance_embed else None
        self.txt_in = Linear(config.context_in_dim, h)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer = LastLayer(h, config.out_channels)

    def forward(  # type: ignore[override]
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        lengths: Lengths | None = None,
        state: State | None = None,
    ) -> Tensor | State:
        """Velocity [B, L_img, out_channels] in the weights' dtype.

        img [B, L_img, in_channels], txt [B, L_txt, context_in_dim] and y [B, vec_in_dim] in any dtype;
        img_ids and txt_ids [B, L, axes], timesteps [B] in [0, 1] and guidance [B] (say 3.5) in float32 or
        wider, because bf16 cannot hold 1000 t or positions above 256. Tokens of reference images (Kontext)
        come after those of the image in img, and the result covers them too. A model without guidance
        embedding ignores guidance; one with it raises ValueError when it gets None.

        `lengths` and `state` as in `FluxModel.forward`.
        """
        state = state or self.embed(img, txt, timesteps, y, guidance)
        return self.run(state, torch.cat((txt_ids, img_ids), dim=1), lengths)

    @staticmethod
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
        """See `FluxModel.arguments`."""
        return {
            "img": image,
            "img_ids": image_ids,
            "txt": text,
            "txt_ids": text_ids,
            "timesteps": timesteps,
            "y": pooled,
            "guidance": guidance,
        }

    def modulations(self, state: State) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """silu(vec): each block makes its own of it."""
        silu_vec = F.silu(state[2])
        return (silu_vec,), (silu_vec,)

    def embed(self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> State:
        """Tokens [B, L_img, h] and [B, L_txt, h], and the vector [B, h] that modulates every block."""
        dtype = self.img_in.weight.dtype  # inside forward: FSDP has the low-precision weights in place
        vec = self.condition(timesteps, guidance, dtype)
        vec = vec + self.vector_in(y.to(dtype))
        return self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype)), vec
