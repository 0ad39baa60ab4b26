"""How much memory tensors take at once: what a module keeps for its backward, and its peaks.

On fake tensors nothing is allocated, so a block of any size is measured on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the context, counts the bytes of all tensors that operators return, each storage once.

    Workspaces inside an operator are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """The most there were."""
        self._known: dict[int, int] = {}  # sizes

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size

    def of_at_least(self, size: int) -> int:
        """Bytes alive in storages of at least `size` bytes."""
        return sum(each for each in self._known.values() if each >= size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.watch(leaf)
        return out


class Cost(NamedTuple):
    """Bytes that a module takes beside its weights and inputs."""

    kept: int
    """Between forward and backward, its output included."""
    kept_large: int
    """In large storages, of `kept`."""
    forward: int
    """At the peak of forward."""
    backward: int
    """At the peak of backward, with what was kept and the gradients of output, inputs and weights."""


def fill_fake(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Give a module from the meta device weights and buffers in `dtype`, inside a FakeTensorMode.

    Returns the weights.
    """
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                weight = torch.empty(parameter.shape, dtype=dtype)
                owner._parameters[name] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                wanted = dtype if buffer.is_floating_point() else buffer.dtype
                owner._buffers[name] = torch.empty(buffer.shape, dtype=wanted)
    return list(module.parameters())


def measure(run: Callable[[], Iterable[Tensor]], present: Iterable[Tensor], large: int = 1) -> Cost:
    """The cost of `run()`, which returns tensors that require gradients, and of their backward.

    Args:
        present: weights and inputs, which are not counted.
        large: bytes from which on a storage is a large one.
    """
    with LiveBytes() as live:
        for tensor in present:
            live.watch(tensor)
        before, large_before = live.now, live.of_at_least(large)
        outputs = list(run())
        kept, forward = live.now - before, live.peak - before
        kept_large = live.of_at_least(large) - large_before
        gradients = [torch.empty_like(output) for output in outputs]
        edges = [get_gradient_edge(output) for output in outputs]
        outputs.clear()  # in a model, only the next block holds them, and not any longer
        live.peak = live.now
        torch.autograd.backward(edges, gradients)
        return Cost(kept, kept_large, forward, live.peak - before)
