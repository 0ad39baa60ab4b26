"""What this rank sends: `with Sent() as sent:` counts every collective and message, and their bytes.

Calls of `torch.distributed` are counted wherever they come from (FSDP, the pipeline's schedules, the
operators of context parallelism, which no dispatch mode can see into), functional collectives as operators:
one whose result checkpointing has kept is not counted again. Bytes are those of a ring: of n ranks, each
sends (n - 1) / n of the whole tensor for an all-gather or a reduce-scatter, twice that for an all-reduce.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.parallel import gathered
from flux_trainer.parallel.group import group_named
from flux_trainer.runtime import dist as runtime_dist


def _gathered(group: dist.ProcessGroup, input_tensor: Tensor, **_: Any) -> int:
    return (group.size() - 1) * input_tensor.nbytes


def _scattered(group: dist.ProcessGroup, output: Tensor, **_: Any) -> int:
    return (group.size() - 1) * output.nbytes


def _reduced(group: dist.ProcessGroup, tensor: Tensor, **_: Any) -> int:
    size, rest = divmod(2 * (group.size() - 1) * tensor.nbytes, group.size())
    assert not rest, "choose shapes that divide, or bytes cannot be compared exactly"
    return size


def _exchanged(group: dist.ProcessGroup, input: Tensor, input_split_sizes: Any, **_: Any) -> int:
    assert input_split_sizes, "equal parts are not counted yet"
    return (sum(input_split_sizes) - input_split_sizes[group.rank()]) * input.element_size()


def _message(group: dist.ProcessGroup, tensor: Tensor, **_: Any) -> int:
    return tensor.nbytes


def _unforeseen(group: dist.ProcessGroup, **_: Any) -> int:
    raise AssertionError("a collective that no formula foresees")


# By function: what it is called here, and the bytes sent, given its arguments by name. Some of these names
# are newer than torch 2.11, and others lead to them.
FUNCTIONS: dict[str, tuple[str, Callable[..., int]]] = {
    "all_gather_single": ("all-gather", _gathered),
    "all_gather_into_tensor": ("all-gather", _gathered),
    "reduce_scatter_single": ("reduce-scatter", _scattered),
    "reduce_scatter_tensor": ("reduce-scatter", _scattered),
    "all_reduce": ("all-reduce", _reduced),
    "all_to_all_single": ("all-to-all", _exchanged),
    "isend": ("send", _message),
    "send": ("send", _message),
}
UNFORESEEN = ("all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter")
FUNCTIONS |= dict.fromkeys(UNFORESEEN, ("unforeseen", _unforeseen))
HOLDERS = (dist, c10d, gathered, runtime_dist)
"""Modules that hold these functions, under whatever name."""


class Sent:
    """Counts while it is entered."""

    def __init__(self, operators: bool = True) -> None:
        """operators: see functional collectives; torch.compile refuses to work under what sees them."""
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        """By what it is, and the name of the group in which it travels."""
        self._inside = False  # one of the functions, which may call another
        self._operators = _Operators(self) if operators else nullcontext()

    def __enter__(self) -> Sent:
        self._replaced = []
        for name, (kind, size) in FUNCTIONS.items():
            if original := getattr(c10d, name, None):
                counted = self._counting(original, kind, size)
                for module in HOLDERS:
                    for key in [key for key, value in vars(module).items() if value is original]:
                        self._replaced.append((module, key, original))
                        setattr(module, key, counted)
        self._operators.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._operators.__exit__(*error)
        for module, key, original in self._replaced:
            setattr(module, key, original)

    def take(self) -> tuple[dict[str, int], int]:
        """Calls by kind, and all bytes, since the last time."""
        taken = dict(self.calls), sum(self.bytes.values())
        self.calls.clear()
        self.bytes.clear()
        return taken

    def count(self, kind: str, group: dist.ProcessGroup, size: int) -> None:
        self.calls[kind] += 1
        self.bytes[kind, group.group_name] += size

    def _counting(self, original: Any, kind: str, size: Callable[..., int]) -> Any:
        signature = inspect.signature(original)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return original(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            group = given.pop("group", None) or dist.group.WORLD
            self.count(kind, group, size(group, **given))
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return counted


class _Operators(TorchDispatchMode):
    """Counts functional collectives."""

    def __init__(self, sent: Sent) -> None:
        super().__init__()
        self.sent = sent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collectives = torch.ops._c10d_functional
        if func.namespace == "_c10d_functional" and func is not collectives.wait_tensor.default:
            group = group_named(args[-1])
            if func is collectives.all_reduce.default:
                self.sent.count("all-reduce", group, _reduced(group, args[0]))
            elif func is collectives.all_gather_into_tensor.default:
                self.sent.count("all-gather", group, _gathered(group, args[0]))
            else:
                _unforeseen(group)
        return func(*args, **(kwargs or {}))
