"""Host offload: what blocks keep for backward waits in host memory.

Blocks run one after another, forward and then backward in reverse. What block k keeps

    forward     is copied to the host as soon as it is there; on the device it is let go when k + 1 has run,
                so that the copy has the time of a block
    backward    comes back while block k + 1 computes

so the device holds what two blocks keep, and what the last block keeps never leaves. On CUDA, copies go
through a stream of their own and pinned memory; elsewhere they are plain ones.

What is kept is counted in storages: views of one tensor travel together. Some stays: parameters, which live
anyway; positions, which all blocks share; and what is small.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

LARGE = 1 << 20
"""Bytes from which on a storage is moved."""


class Moved:
    """A storage that was moved: on the host, and at times on the device."""

    def __init__(self, there: Tensor, stream: torch.cuda.Stream | None) -> None:
        """there: its bytes on the device, [n] uint8."""
        self.device, self.stream = there.device, stream
        self.there: Tensor | None = there
        self.done: torch.cuda.Event | None = None
        """When the latest copy is."""
        self.host = torch.empty(there.shape, dtype=there.dtype, pin_memory=stream is not None)
        self.unread = 0
        """How many of the tensors in it are still to be read."""
        self._copy(self.host, there)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            self.done = self.stream.record_event()

    def _wait(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)

    def __del__(self) -> None:
        if self.there is not None:  # unread, and a copy may still be on its way
            self._wait()

    def let_go(self) -> None:
        """Free it on the device, where it is copied by now."""
        self._wait()
        self.there = None

    def fetch(self) -> None:
        """Start to copy it to the device, if it is not there."""
        if self.there is None:
            self.there = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self._copy(self.there, self.host)

    def read(self) -> Tensor:
        """Its bytes on the device. With the last reader they are nobody's but the reader's."""
        self.fetch()
        self._wait()
        there, self.unread = self.there, self.unread - 1
        assert there is not None
        if self.unread <= 0:
            self.there = None
        return there


class Packed(NamedTuple):
    """A tensor in a storage that was moved."""

    moved: Moved
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Group:
    """What one call of a block keeps. Saved tensors hold it; it holds none of them."""

    def __init__(
        self, before: Group | None, staying: Iterable[Tensor], stream: torch.cuda.Stream | None
    ) -> None:
        """before: of the block whose backward comes next; staying: tensors that are not moved."""
        self.before = weakref.ref(before) if before else lambda: None
        self.stream = stream
        self.staying = {x.untyped_storage()._cdata for x in staying}
        self.moved: weakref.WeakValueDictionary[tuple[int, int], Moved] = weakref.WeakValueDictionary()

    @torch.no_grad()
    def pack(self, x: Tensor) -> Tensor | Packed:
        """What autograd is to hold in place of x: on its way to the host, or x itself."""
        storage = x.untyped_storage()
        stays = storage._cdata in self.staying or storage.nbytes() < LARGE
        if stays or x.is_cuda != (self.stream is not None):
            return x.detach()  # as an output of a node, x would hold itself
        key = (storage._cdata, x._version)
        moved = self.moved.get(key)
        if moved is None:
            whole = x.detach().as_strided((storage.nbytes() // x.itemsize,), (1,), 0)
            moved = self.moved[key] = Moved(whole.view(torch.uint8), self.stream)
        moved.unread += 1
        return Packed(moved, x.dtype, tuple(x.shape), x.stride(), x.storage_offset())

    @torch.no_grad()
    def unpack(self, packed: Tensor | Packed) -> Tensor:
        """What was packed. The rest of the group comes along, and what is wanted next."""
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        if (before := self.before()) is not None:
            before.fetch()
        whole = packed.moved.read().view(packed.dtype)
        return whole.as_strided(packed.size, packed.stride, packed.offset)

    def fetch(self) -> None:
        for moved in list(self.moved.values()):
            if moved.unread > 0:
                moved.fetch()

    def let_go(self) -> None:
        for moved in list(self.moved.values()):
            moved.let_go()


class Offload:
    """Moves what the blocks of a model's part keep."""

    def __init__(self) -> None:
        self.group: Group | None = None
        """Of the block that runs, or ran last."""
        self.stream: torch.cuda.Stream | None = None

    def apply(self, blocks: Iterable[nn.Module]) -> None:
        """Let the blocks, which run in this order, keep on the host; in place, after all that replaces their
        `forward`."""
        for index, block in enumerate(blocks):
            block.forward = partial(self._run, index, block, block.forward)

    def _run(self, index: int, block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        if args[0].is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(args[0].device)
        last = self.group
        positions = next(x for x in reversed(args) if len(x))  # behind them are lengths: empty tensors
        self.group = Group(last if index else None, (*block.parameters(), positions), self.stream)
        with saved_tensors_hooks(self.group.pack, self.group.unpack):
            out = forward(*args)
        if last is not None:
            last.let_go()
        return out

    def contexts(
        self, choose: Callable[[], Callable[[Any], bool]]
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What to enter around a block's forward, and around its recomputation: stands in for
        `create_selective_checkpoint_contexts`, whose kept results saved-tensor hooks never see.

        Args:
            choose: makes a function that is asked of each operator in turn whether to keep its result.
        """
        if not torch.is_grad_enabled():
            return nullcontext(), nullcontext()
        assert self.group is not None
        kept: deque[Any] = deque()
        return _Keep(choose(), self.group, kept), _Take(choose(), self.group, kept)


class _Selective(TorchDispatchMode):
    def __init__(self, keeps: Callable[[Any], bool], group: Group, kept: deque[Any]) -> None:
        super().__init__()
        self.keeps, self.group, self.kept = keeps, group, kept


class _Keep(_Selective):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if self.keeps(op):
            self.kept.append(tree_map_only(Tensor, self.group.pack, out))
        return out


class _Take(_Selective):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.keeps(op):
            return tree_map_only((Tensor, Packed), self.group.unpack, self.kept.popleft(), is_leaf=_is_packed)
        return op(*args, **(kwargs or {}))


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)
