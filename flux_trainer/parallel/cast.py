"""Mixed precision on one rank: weights are stored wide and read narrow.

FSDP's mixed precision gathers each block's weights into a flat copy and reduces its gradients through
another. With nobody to share with, that is only traffic. Here a module's parameter, read as an attribute, is
its cast: the cast's backward returns the gradient in the stored dtype, straight into `.grad`. Names,
`parameters()` and `state_dict()` still see what is stored; inside a compiled block the cast belongs to the
graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Kind = tuple[type[nn.Module], tuple[str, ...]]
"""A module's class, and which of its parameters are not None."""


def read_as(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every parameter of `model` be read as `dtype`, in place; what is stored stays as it is."""
    readers: dict[Kind, type[nn.Module]] = {}  # one per kind, so that compiled blocks share a graph
    for module in model.modules():
        names = tuple(name for name, parameter in module._parameters.items() if parameter is not None)
        if names:
            kind = (type(module), names)
            if kind not in readers:
                readers[kind] = _reader(*kind, dtype)
            module.__class__ = readers[kind]


def _reader(cls: type[nn.Module], names: tuple[str, ...], dtype: torch.dtype) -> type[nn.Module]:
    """A subclass of `cls` whose attributes `names` are casts of the parameters."""

    def cast_of(name: str) -> property:
        def read(module: nn.Module) -> Tensor:
            parameter = module._parameters[name]
            assert parameter is not None
            return parameter.to(dtype)

        return property(read)

    return type(cls.__name__, (cls,), {name: cast_of(name) for name in names})
