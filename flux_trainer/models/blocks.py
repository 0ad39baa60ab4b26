"""The transformer blocks that FLUX.1 and FLUX.2 share: double-stream ones, in which image and text tokens
have weights of their own and meet in attention, and single-stream ones over all tokens.

Modulations come as tensors from outside: FLUX.1 makes them in each block, FLUX.2 once for all blocks.
Shapes: B samples, L tokens, h = hidden_size, H heads of D dimensions.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from flux_trainer.models.attention import Shapes, attention
from flux_trainer.models.fused import gated_sum
from flux_trainer.models.layers import (
    GELU,
    FusedLinear,
    LayerNorm,
    Linear,
    QKNorm,
    SwiGLU,
    split_modulation,
)

Attention = Callable[[Tensor, Tensor, Tensor, Shapes], Tensor]


class BlockConfig(Protocol):
    """What a block needs of a model's config."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_hidden(self) -> int: ...
    @property
    def qkv_bias(self) -> bool:
        """Of the double-stream blocks' qkv."""

    @property
    def bias(self) -> bool:
        """Of all other linears."""

    @property
    def gated(self) -> bool:
        """SwiGLU in the MLPs, in place of GELU."""


def mlp_sections(config: BlockConfig) -> dict[str, int]:
    """Outputs of the linear before an MLP's activation."""
    size = config.mlp_hidden
    return {"gate": size, "up": size} if config.gated else {"mlp": size}


def mlp(config: BlockConfig) -> nn.Sequential:
    """[..., h] -> [..., h]."""
    h = config.hidden_size
    return nn.Sequential(
        FusedLinear({"x": h}, mlp_sections(config), config.bias),
        SwiGLU() if config.gated else GELU(),
        Linear(config.mlp_hidden, h, config.bias),
    )


class SelfAttention(nn.Module):
    """The projections of one stream around the joint attention."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv = FusedLinear({"x": h}, {"q": h, "k": h, "v": h}, config.qkv_bias)
        self.norm = QKNorm(config.head_dim)
        self.proj = Linear(h, h, config.bias)

    def project(self, x: Tensor, pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normalised and turned, and values: three [B, L, H, D]."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv.split(self.qkv(x)))
        return *self.norm(q, k, pe), v


class DoubleStreamBlock(nn.Module):
    """Image and text tokens with weights of their own, meeting in one attention over text, then image."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.img_norm1 = LayerNorm()
        self.img_attn = SelfAttention(config)
        self.img_norm2 = LayerNorm()
        self.img_mlp = mlp(config)
        self.txt_norm1 = LayerNorm()
        self.txt_attn = SelfAttention(config)
        self.txt_norm2 = LayerNorm()
        self.txt_mlp = mlp(config)
        self.attention: Attention = attention

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        pe: Tensor,
        *lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """img [B, L_img, h], txt [B, L_txt, h], modulations [B, 6 h], pe (text, then image) -> img, txt.

        `lengths` as in `attention`, for text and image together.
        """
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = split_modulation(img_mod, 2)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = split_modulation(txt_mod, 2)

        txt_pe, img_pe = pe.split((txt.shape[1], img.shape[1]), dim=1)

        img_q, img_k, img_v = self.img_attn.project(self.img_norm1(img, img_shift1, img_scale1), img_pe)
        txt_q, txt_k, txt_v = self.txt_attn.project(self.txt_norm1(txt, txt_shift1, txt_scale1), txt_pe)
        q = torch.cat((txt_q, img_q), dim=1)  # [B, L, H, D]
        k = torch.cat((txt_k, img_k), dim=1)
        v = torch.cat((txt_v, img_v), dim=1)
        joint = self.attention(q, k, v, lengths).flatten(2)  # [B, L, h]
        txt_out, img_out = joint.split((txt.shape[1], img.shape[1]), dim=1)

        img = gated_sum(img, img_gate1, self.img_attn.proj(img_out))
        img = gated_sum(img, img_gate2, self.img_mlp(self.img_norm2(img, img_shift2, img_scale2)))
        txt = gated_sum(txt, txt_gate1, self.txt_attn.proj(txt_out))
        txt = gated_sum(txt, txt_gate2, self.txt_mlp(self.txt_norm2(txt, txt_shift2, txt_scale2)))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side over all tokens, in two fused linears (as Dehghani et al., ViT-22B)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.head_dim = config.head_dim
        self.linear1 = FusedLinear({"x": h}, {"q": h, "k": h, "v": h, **mlp_sections(config)}, config.bias)
        self.linear2 = FusedLinear({"attention": h, "mlp": config.mlp_hidden}, {"x": h}, config.bias)
        self.norm = QKNorm(config.head_dim)
        self.pre_norm = LayerNorm()
        self.mlp_act = SwiGLU() if config.gated else GELU()
        self.attention: Attention = attention

    def forward(self, x: Tensor, mod: Tensor, pe: Tensor, *lengths: Tensor) -> Tensor:
        """x [B, L, h] (text, then image), modulation [B, 3 h], pe -> x; `lengths` as in `attention`."""
        shift, scale, gate = split_modulation(mod, 1)
        q, k, v, *mlp = self.linear1.split(self.linear1(self.pre_norm(x, shift, scale)))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))  # [B, L, H, D]
        q, k = self.norm(q, k, pe)
        joint = self.attention(q, k, v, lengths).flatten(2)  # [B, L, h]
        return gated_sum(x, gate, self.linear2(torch.cat((joint, self.mlp_act(*mlp)), dim=-1)))
