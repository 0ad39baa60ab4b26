"""The FLUX.1 transformer: double-stream blocks with weights of their own for image and text tokens, then
single-stream blocks over both, all modulated by one vector made of timestep, guidance and pooled caption.

Parameter names, row order and arithmetic are Black Forest Labs'. Nothing here knows of training or of
several devices. Shapes: B samples, L tokens, h = hidden_size, H heads of D dimensions.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flux_trainer.models.attention import apply_rope, attention, rope_table
from flux_trainer.models.configs import TIME_DIM, Flux1Config
from flux_trainer.models.init import Constant, Distribution, Normal, Rows, xavier_uniform
from flux_trainer.models.layers import (
    FusedLinear,
    LastLayer,
    LayerNorm,
    MLPEmbedder,
    Modulation,
    QKNorm,
    modulate,
    timestep_embedding,
)

State = tuple[Tensor, Tensor, Tensor]
"""What goes from block to block: img [B, L_img, h], txt [B, L_txt, h], vec [B, h]."""


class SelfAttention(nn.Module):
    """The projections of one stream around the joint attention."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        h = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv = FusedLinear({"x": h}, {"q": h, "k": h, "v": h}, bias=config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(h, h)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, and values: three [B, L, H, D]."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv.split(self.qkv(x)))
        return *self.norm(q, k), v


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, meeting in one attention over text, then image."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        h, mlp = config.hidden_size, config.mlp_hidden
        self.img_mod = Modulation(h, triples=2)
        self.img_norm1 = LayerNorm(h)
        self.img_attn = SelfAttention(config)
        self.img_norm2 = LayerNorm(h)
        self.img_mlp = nn.Sequential(nn.Linear(h, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, h))
        self.txt_mod = Modulation(h, triples=2)
        self.txt_norm1 = LayerNorm(h)
        self.txt_attn = SelfAttention(config)
        self.txt_norm2 = LayerNorm(h)
        self.txt_mlp = nn.Sequential(nn.Linear(h, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, h))
        self.attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """img [B, L_img, h], txt [B, L_txt, h], vec [B, h], pe (text, then image) -> img, txt."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_q, img_k, img_v = self.img_attn.project(modulate(self.img_norm1(img), img_shift1, img_scale1))
        txt_q, txt_k, txt_v = self.txt_attn.project(modulate(self.txt_norm1(txt), txt_shift1, txt_scale1))
        q = apply_rope(torch.cat((txt_q, img_q), dim=1), pe)  # [B, L, H, D]
        k = apply_rope(torch.cat((txt_k, img_k), dim=1), pe)
        v = torch.cat((txt_v, img_v), dim=1)
        joint = self.attention(q, k, v).flatten(2)  # [B, L, h]
        txt_out, img_out = joint.split((txt.shape[1], img.shape[1]), dim=1)

        img = img + img_gate1 * self.img_attn.proj(img_out)
        img = img + img_gate2 * self.img_mlp(modulate(self.img_norm2(img), img_shift2, img_scale2))
        txt = txt + txt_gate1 * self.txt_attn.proj(txt_out)
        txt = txt + txt_gate2 * self.txt_mlp(modulate(self.txt_norm2(txt), txt_shift2, txt_scale2))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over all tokens, in two fused linears (as Dehghani et al., ViT-22B)."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        h, mlp = config.hidden_size, config.mlp_hidden
        self.head_dim = config.head_dim
        self.linear1 = FusedLinear({"x": h}, {"q": h, "k": h, "v": h, "mlp": mlp})
        self.linear2 = FusedLinear({"attention": h, "mlp": mlp}, {"x": h})
        self.norm = QKNorm(config.head_dim)
        self.pre_norm = LayerNorm(h)
        self.mlp_act = nn.GELU(approximate="tanh")
        self.modulation = Modulation(h, triples=1)
        self.attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """x [B, L, h] (text, then image), vec [B, h], pe -> x."""
        shift, scale, gate = self.modulation(vec)
        q, k, v, mlp = self.linear1.split(self.linear1(modulate(self.pre_norm(x), shift, scale)))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # [B, L, H, D]
        q, k = self.norm(q, k)
        joint = self.attention(apply_rope(q, pe), apply_rope(k, pe), v).flatten(2)  # [B, L, h]
        return x + gate * self.linear2(torch.cat((joint, self.mlp_act(mlp)), dim=-1))


class Flux1Model(nn.Module):
    """The velocity field of FLUX.1, for packed latents."""

    HEAD = ("final_layer",)
    """The children that come after the blocks; all other children but the blocks come before them."""

    def __init__(self, config: Flux1Config) -> None:
        super().__init__()
        self.config = config
        h = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, h)
        self.time_in = MLPEmbedder(TIME_DIM, h)
        self.vector_in = MLPEmbedder(config.vec_in_dim, h)
        self.guidance_in = MLPEmbedder(TIME_DIM, h) if config.guidance_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, h)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(config) for _ in range(config.depth_single_blocks)
        )
        self.final_layer: LastLayer | None = LastLayer(h, config.out_channels)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        state: State | None = None,
    ) -> Tensor | State:
        """Velocity [B, L_img, out_channels] in the weights' dtype.

        img [B, L_img, in_channels], txt [B, L_txt, context_in_dim] and y [B, vec_in_dim] in any dtype;
        img_ids and txt_ids [B, L, axes], timesteps [B] in [0, 1] and guidance [B] (say 3.5) in float32 or
        wider, because bf16 cannot hold 1000 t or positions above 256. A model without guidance embedding
        ignores guidance; one with it raises ValueError when it gets None.

        Of a model that was cut into stages (`HEAD`), all but the first go on from `state`, what the stage
        before returned, and all but the last return theirs.
        """
        img, txt, vec = state or self.embed(img, txt, timesteps, y, guidance)
        pe = rope_table(torch.cat((txt_ids, img_ids), dim=1), self.config.axes_dim, self.config.theta)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), dim=1)  # [B, L_txt + L_img, h]
        for block in self.single_blocks:
            x = block(x, vec, pe)
        txt, img = x.split((txt.shape[1], img.shape[1]), dim=1)
        return (img, txt, vec) if self.final_layer is None else self.final_layer(img, vec)

    def embed(self, img: Tensor, txt: Tensor, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> State:
        """Tokens [B, L_img, h] and [B, L_txt, h], and the vector [B, h] that modulates every block."""
        dtype = self.img_in.weight.dtype  # inside forward: FSDP has the low-precision weights in place
        vec = self.time_in(timestep_embedding(timesteps, TIME_DIM).to(dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError(
                    "This model has a guidance embedding (guidance_embed = true) and got guidance=None; "
                    "pass a tensor [B] with one value per sample."
                )
            vec = vec + self.guidance_in(timestep_embedding(guidance, TIME_DIM).to(dtype))
        vec = vec + self.vector_in(y.to(dtype))
        return self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype)), vec

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
