"""Tensor parallelism: each block's attention heads and MLP features are shared out over the ranks of a group.

Megatron's scheme (Shoeybi et al., "Megatron-LM", 2019): of two linears in a row, each rank has some outputs
of the first ("column parallel": Megatron's weights are transposed) and the matching inputs of the second
("row parallel"); one sum over ranks completes the second's output, another the gradient of the first's input.
What lies between (attention over the rank's heads, GELU or SwiGLU) needs no communication. Fused linears
stay fused: each of their sections is shared out on its own. Modulations are column parallel too, and their
output, one row per sample, is gathered. Between the blocks, every rank holds the activations of all tokens,
and the embedders and the final layer are whole. So are modulations that all blocks share (FLUX.2): shared
out, they would save 2 to 4 % of the weights, but hardly any time (there is one row per sample), and no block
would send less.

With micro-batches of B samples, L text and image tokens, hidden size h and head dimension D, a block's
collectives have these numbers of elements, in the dtype of the computation:

    double block   forward   all-reduce 2 B L h     all-gather (12 B h)
                   backward  all-reduce 2 B L h + (2 B h) + 4 D
    single block   forward   all-reduce B L h       all-gather (3 B h)
                   backward  all-reduce B L h + (B h) + 2 D

What is in brackets belongs to a modulation of the block's own: FLUX.1 has it, FLUX.2 does not.
Over n ranks, a ring sends 2 (n - 1) / n times as many for an all-reduce, (n - 1) / n times for an all-gather.
A block that is recomputed in backward repeats the collectives of its forward; selective checkpointing keeps
their results instead. 4 D and 2 D are the scales of query and key norms: whole on every rank but applied to
its own heads only, so that their gradients are partial sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flux_trainer.models import blocks, flux1, on_cpu
from flux_trainer.models.layers import FusedLinear, RMSNorm, rms_norm_rope
from flux_trainer.runtime.layout import Layout, share_out


def tensor_parallel(named_blocks: Iterable[tuple[str, nn.Module]], group: ProcessGroup) -> dict[str, Layout]:
    """Share out the parameters of `named_blocks`, (name in the model, module), over `group`, in place.

    The blocks are plain and lie on the meta device, and their sizes suit (`check_heads`). Parameter names
    stay; a shared-out parameter becomes a smaller one. Checkpointing, compile and FSDP come after.

    Returns:
        By native name, the layout of each parameter that is shared out; all others are whole on every rank.
    """
    layouts: dict[str, Layout] = {}
    if group.size() == 1:
        return layouts
    for block_name, block in named_blocks:
        for path, role in _ROLES[type(block)].items():
            module = block.get_submodule(path)
            if isinstance(module, nn.Linear):
                for parameter_name, layout in _shrink(module, role.dim, group).items():
                    layouts[f"{block_name}.{path}.{parameter_name}"] = layout
            module.__class__ = _with_role(role, type(module))  # type: ignore[arg-type]
            assert isinstance(module, _Role)
            module.tp_group, module.tp_rank, module.tp_size = group.group_name, group.rank(), group.size()
    return layouts


def _shrink(linear: nn.Linear, dim: int, group: ProcessGroup) -> dict[str, Layout]:
    """Leave `linear` this rank's part of its rows (dim 0) or columns (dim 1), section by section."""
    sections = {"": linear.weight.shape[dim]}
    if isinstance(linear, FusedLinear):
        sections = linear.rows if dim == 0 else linear.columns
    layouts = {}
    for name, parameter in list(linear.named_parameters()):
        assert parameter.is_meta, f"{name} has memory already"
        if parameter.ndim > dim:  # the bias of a row-parallel linear stays whole
            layouts[name] = share_out(parameter.shape, dim, [*sections.values()], group.rank(), group.size())
            part = parameter.new_empty(layouts[name].local_shape)
            setattr(linear, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    for section in sections:
        sections[section] //= group.size()
    linear.out_features, linear.in_features = linear.weight.shape
    return layouts


class _Role(nn.Module):
    """What a module becomes beside what it is: mixed into its class, so that its attributes stay its own."""

    dim = 0
    """Of the weight, along which it is shared out."""
    tp_group: str
    """Name of the group: a constant to the compiler, which a group is not."""
    tp_rank: int
    tp_size: int


class _ColumnParallel(_Role):
    """Whole input [..., in] -> this rank's outputs [..., out / n]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Spread.apply(x, self.tp_group))


class _Gathered(_ColumnParallel):
    """Whole input [B, in] -> whole output [B, out], of which each rank computes consecutive columns."""

    def forward(self, x: Tensor) -> Tensor:
        return _Gather.apply(super().forward(x), self.tp_group, self.tp_rank, self.tp_size)


class _RowParallel(_Role):
    """This rank's inputs [..., in / n] -> whole output [..., out]; the bias is added once, after the sum."""

    dim = 1
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = _Sum.apply(on_cpu.linear(x, self.weight, None), self.tp_group)
        return y if self.bias is None else y + self.bias


class _PartialScales(_Role):
    """Norms of this rank's heads: each rank's gradient of the scales lacks the other ranks' heads."""

    query_norm: RMSNorm
    key_norm: RMSNorm

    def forward(self, q: Tensor, k: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        scales = torch.stack((self.query_norm.scale, self.key_norm.scale))  # [2, D]
        q_scale, k_scale = _Spread.apply(scales, self.tp_group).unbind()
        return rms_norm_rope(q, q_scale, pe), rms_norm_rope(k, k_scale, pe)


_STREAM: dict[str, type[_Role]] = {
    "attn.qkv": _ColumnParallel,
    "attn.norm": _PartialScales,
    "attn.proj": _RowParallel,
    "mlp.0": _ColumnParallel,
    "mlp.2": _RowParallel,
}
_DOUBLE = {f"{stream}_{path}": role for stream in ("img", "txt") for path, role in _STREAM.items()}
_SINGLE: dict[str, type[_Role]] = {
    "linear1": _ColumnParallel,
    "norm": _PartialScales,
    "linear2": _RowParallel,
}
_ROLES: dict[type[nn.Module], dict[str, type[_Role]]] = {
    blocks.DoubleStreamBlock: _DOUBLE,
    blocks.SingleStreamBlock: _SINGLE,
    flux1.DoubleStreamBlock: {**_DOUBLE, "img_mod.lin": _Gathered, "txt_mod.lin": _Gathered},
    flux1.SingleStreamBlock: {**_SINGLE, "modulation.lin": _Gathered},
}


@cache
def _with_role(role: type[_Role], cls: type[nn.Module]) -> type[nn.Module]:
    """One class per kind, so that compiled blocks share a graph."""
    return type(cls.__name__, (role, cls), {})


class _Spread(torch.autograd.Function):
    """The same tensor to every rank: nothing to do; backward, the sum of what the ranks make of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum of the ranks' tensors; backward, the same gradient to every rank: nothing to do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """[B, C / n] of every rank side by side; backward, each rank keeps its part of the one gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, rank: int, size: int) -> Tensor:
        ctx.rank, ctx.size = rank, size
        parts = torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size, group)
        parts = torch.ops._c10d_functional.wait_tensor(parts)  # [n B, C / n]
        return parts.unflatten(0, (size, -1)).transpose(0, 1).flatten(1)  # [B, C]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.chunk(ctx.size, dim=1)[ctx.rank], None, None, None


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))
