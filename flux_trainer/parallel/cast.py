"""Mixed precision on one rank: weights are stored wide and read narrow.

FSDP's mixed precision gathers each block's weights into a flat copy and reduces its gradients through another.
With nobody to share with, that is only traffic. Here a module's parameter, read as an attribute, is its cast:
the cast's backward returns the gradient in the stored dtype, straight into `.grad`. Names, `parameters()` and
`state_dict()` still see what is stored, and inside a compiled block the cast belongs to the graph.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


@cache
def _reader(cls: type[nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> type[nn.Module]:
    """A subclass of `cls` whose parameters `names` read as `dtype`; one per kind, so that blocks share graphs."""

    def cast_of(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            return self._parameters[name].to(dtype)  # type: ignore[union-attr]

        return property(read)

    return type(cls.__name__, (cls,), {name: cast_of(name) for name in names})


def read_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every parameter of `model` be read as `dtype`, in place; what is stored stays as it is."""
    for module in model.modules():
        names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
        if names:
            module.__class__ = _reader(type(module), names, dtype)
