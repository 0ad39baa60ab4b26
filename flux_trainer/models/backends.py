"""Attention by the name of who computes it (`[attention] backend`), and whether a device can.

"auto" leaves the choice to torch (`models/attention.py`), which from 2.11 on takes on CUDA the first that
accepts dtype and head size: cuDNN (9.15.1 or newer, on H100, B200 and their like), flash, efficient, math.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_trainer.config.compute import Backend
from flux_trainer.models.attention import Shapes, attention, without_padding
from flux_trainer.models.blocks import Attention

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries, keys and values [B, H, L, D]."""

_TORCHS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CAN_USE = {
    "cudnn": can_use_cudnn_attention,
    "flash": can_use_flash_attention,
    "efficient": can_use_efficient_attention,
}
OLDEST_CUDNN = 91501
"""Before 9.15.1 it reads beyond sequences whose length is no multiple of 128 (pytorch issue 169849)."""


@functools.cache
def attention_by(name: Backend) -> Attention:
    """`models.attention.attention`, computed by that backend alone; the same function for the same name, so
    that blocks share a compiled graph.

    "flex" is compiled with the block around it, or by itself where nothing else is.
    """
    if name == "auto":
        return attention
    kernel = _flex() if name == "flex" else functools.partial(_sdpa, _TORCHS[name])

    def whole(q: Tensor, k: Tensor, v: Tensor, _: object = ()) -> Tensor:
        compute = kernel if q.shape[1] else _math  # fused kernels refuse a rank that has no tokens
        return compute(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Shapes = ()) -> Tensor:
        return without_padding(whole, q, k, v, lengths) if lengths else whole(q, k, v)

    return attend


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


_math = functools.partial(_sdpa, SDPBackend.MATH)


def _flex() -> Kernel:
    from torch._dynamo import config as compiler
    from torch.nn.attention.flex_attention import flex_attention

    compiler.recompile_limit = max(compiler.recompile_limit, 64)  # as in `parallel/compile.py`
    alone = torch.compile(flex_attention, fullgraph=True)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flex_attention(q, k, v) if torch.compiler.is_compiling() else alone(q, k, v)
        assert isinstance(out, Tensor)
        return out

    return kernel


def check_backend(
    name: Backend, device: torch.device, dtype: torch.dtype, head_dim: int, *, training: bool
) -> None:
    """Refuse a backend that this device cannot run, before anything expensive.

    Args:
        dtype: of queries, keys and values.
        training: whether there is a backward.

    Raises:
        ValueError: what is wrong, and what to take instead.
    """
    key = f'attention.backend = "{name}"'
    if device.type != "cuda":
        if name in ("cudnn", "efficient"):
            raise ValueError(
                f'{key} runs on CUDA alone, not on {device.type}; take "auto", "flash" or "math"'
            )
        if name == "flex" and training:
            raise ValueError(f'{key} has no backward on {device.type}; take "auto", "flash" or "math"')
        return
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < OLDEST_CUDNN:
        raise ValueError(
            f"{key} needs cuDNN 9.15.1 or newer, and this torch has {torch.backends.cudnn.version()}: older "
            'ones read beyond sequences whose length is no multiple of 128; take "auto", or a newer torch'
        )
    if name in _CAN_USE:
        q = torch.empty(1, 128, 2, head_dim, dtype=dtype, device=device, requires_grad=training)
        q = q.transpose(1, 2)  # [B, H, L, D]
        # with True, torch warns of the reason
        if not _CAN_USE[name](SDPAParams(q, q, q, None, 0.0, False, False), True):
            raise ValueError(
                f"{key} does not take {str(dtype).removeprefix('torch.')} in heads of {head_dim} on a "
                f'{torch.cuda.get_device_name(device)} (torch\'s warning above says why); take "auto"'
            )
