"""The pieces FLUX transformers are built of, with Black Forest Labs' parameter names.

Whatever dtype the weights have, statistics are computed in float32 or wider.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_trainer.models import on_cpu
from flux_trainer.models.fused import gelu, modulated_norm, norm_rope, swiglu

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """A linear layer for many tokens: CPUs make less work of its gradient (`on_cpu`)."""

    def forward(self, x: Tensor) -> Tensor:
        return on_cpu.linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Several linears in one weight, named: their rows stacked along outputs, or columns along inputs.

    `rows` and `columns` map each section's name to its size, in order. Initialisation, tensor parallelism and
    the maps to other layouts read them here.
    """

    def __init__(self, columns: dict[str, int], rows: dict[str, int], bias: bool = True) -> None:
        super().__init__(sum(columns.values()), sum(rows.values()), bias=bias)
        self.columns = columns
        self.rows = rows

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The sections of this layer's output [..., sum(rows)]."""
        return y.split(list(self.rows.values()), dim=-1)


class MLPEmbedder(nn.Module):
    """Two linears with a SiLU between them: [B, in_dim] -> [B, hidden_dim]."""

    def __init__(self, in_dim: int, hidden_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim, bias)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def rms_norm_rope(x: Tensor, scale: Tensor, pe: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dimension (Zhang and Sennrich, 2019), turned by pe.

    x is [B, L, H, D]. Computed in float32 or wider, returned in the dtype of x.
    """
    return norm_rope(x, scale, pe, NORM_EPS)


class RMSNorm(nn.Module):
    """The scale of an RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """RMSNorm of queries and keys over the head dimension, then their rotary embedding."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, q: Tensor, k: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B, L, H, D], pe [B, L, 1, D/2, 2] (`rope_table`)."""
        return rms_norm_rope(q, self.query_norm.scale, pe), rms_norm_rope(k, self.key_norm.scale, pe)


class LayerNorm(nn.Module):
    """LayerNorm whose scale and shift come from outside (adaLN, Peebles and Xie, 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = NORM_EPS

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """(1 + scale) LN(x) + shift for x [B, L, h], shift and scale [B, 1, h]."""
        return modulated_norm(x, shift, scale, self.eps)


class GELU(nn.Module):
    """In its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


class SwiGLU(nn.Module):
    """silu(gate) * up (Shazeer, 2020), of two tensors, or of the halves of one."""

    def forward(self, *x: Tensor) -> Tensor:
        gate, up = x if len(x) == 2 else x[0].chunk(2, dim=-1)
        return swiglu(gate, up)


class Modulation(nn.Module):
    """silu(vec) [B, h] to `triples` x (shift, scale, gate), side by side: [B, 3 triples h].

    The conditioning vector's SiLU is outside, for it is the same in all blocks.
    """

    def __init__(self, dim: int, triples: int, bias: bool = True) -> None:
        super().__init__()
        self.lin = Linear(dim, 3 * triples * dim, bias)

    def forward(self, silu_vec: Tensor) -> Tensor:
        return self.lin(silu_vec)


def split_modulation(mod: Tensor, triples: int) -> tuple[Tensor, ...]:
    """shift, scale, gate, `triples` times over, each [B, 1, h], of what `Modulation` returned."""
    return mod[:, None, :].chunk(3 * triples, dim=-1)


class LastLayer(nn.Module):
    """adaLN and a linear to the output channels: [B, L, h] -> [B, L, out_channels]."""

    def __init__(self, dim: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.norm_final = LayerNorm()
        self.linear = nn.Linear(dim, out_channels, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None, :].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))
