"""The FLUX.2 transformer: FLUX.1's blocks without biases, with SwiGLU, and with three modulations that all
blocks share, made once of timestep and guidance. There is no pooled caption.

Parameter names, row order, arithmetic and the arguments of `forward` are Black Forest Labs'.
Shapes: B samples, L tokens, h = hidden_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_trainer.models.attention import Lengths
from flux_trainer.models.blocks import DoubleStreamBlock, SingleStreamBlock
from flux_trainer.models.configs import TIME_DIM, Flux2Config
from flux_trainer.models.layers import LastLayer, Linear, MLPEmbedder, Modulation
from flux_trainer.models.model import FluxModel, State


class Flux2Model(FluxModel):
    """The velocity field of FLUX.2, for tokens of the autoencoder's patchified latents."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, h, bias=False)
        self.time_in = MLPEmbedder(TIME_DIM, h, bias=False)
        self.txt_in = Linear(config.context_in_dim, h, bias=False)
        self.guidance_in = MLPEmbedder(TIME_DIM, h, bias=False) if config.use_guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.double_stream_modulation_img = Modulation(h, triples=2, bias=False)
        self.double_stream_modulation_txt = Modulation(h, triples=2, bias=False)
        self.single_stream_modulation = Modulation(h, triples=1, bias=False)
        self.final_layer = LastLayer(h, config.in_channels, bias=False)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        x_ids: Tensor,
        timesteps: Tensor,
        ctx: Tensor,
        ctx_ids: Tensor,
        guidance: Tensor | None = None,
        lengths: Lengths | None = None,
        state: State | None = None,
    ) -> Tensor | State:
        """Velocity [B, L_img, in_channels] in the weights' dtype.

        x [B, L_img, in_channels] and ctx [B, L_txt, context_in_dim] in any dtype; x_ids and ctx_ids
        [B, L, axes] integer or float32, timesteps [B] in [0, 1] and guidance [B] (say 4) in float32 or wider,
        because bf16 cannot hold 1000 t or positions above 256. Tokens of reference images come after those of
        the image in x, and the result covers them too. A model without guidance embedding ignores guidance;
        one with it raises ValueError when it gets None.

        `lengths` and `state` as in `FluxModel.forward`.
        """
        state = state or self.embed(x, ctx, timesteps, guidance)
        return self.run(state, torch.cat((ctx_ids, x_ids), dim=1), lengths)

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
        """See `FluxModel.arguments`; there is no pooled caption."""
        return {
            "x": image,
            "x_ids": image_ids,
            "timesteps": timesteps,
            "ctx": text,
            "ctx_ids": text_ids,
            "guidance": guidance,
        }

    def modulations(self, state: State) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Those that all blocks share: of image and text [B, 6 h] each; of single-stream blocks [B, 3 h]."""
        return state[3:5], state[5:]

    def embed(self, x: Tensor, ctx: Tensor, timesteps: Tensor, guidance: Tensor | None) -> State:
        """Tokens, the conditioning vector, and the modulations that all blocks share."""
        dtype = self.img_in.weight.dtype  # inside forward: FSDP has the low-precision weights in place
        vec = self.condition(timesteps, guidance, dtype)
        silu_vec = F.silu(vec)
        return (
            self.img_in(x.to(dtype)),
            self.txt_in(ctx.to(dtype)),
            vec,
            self.double_stream_modulation_img(silu_vec),
            self.double_stream_modulation_txt(silu_vec),
            self.single_stream_modulation(silu_vec),
        )
