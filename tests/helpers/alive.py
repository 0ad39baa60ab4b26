"""The memory of all tensors alive, as FSDP needs it: its storages come and go by resizing."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Within the context, `peak` is the most bytes that the storages of all tensors seen had at once.

    Tensors are seen as arguments and results of operators, and looked at after each of them. torch's own
    trackers hook into modules, which keeps a few activations alive where a block is recomputed.
    """

    def __init__(self, apart: Alive | None = None) -> None:
        """apart: counts some storages itself, which are then none of this one's."""
        super().__init__()
        self.apart = apart
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.watch(leaf)
        self.peak = max(self.peak, self.now())
        return out

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        if self.apart and self.apart.knows(storage):
            self._storages.pop(storage._cdata, None)
            return
        self._storages[storage._cdata] = weakref.ref(storage)

    def knows(self, storage: torch.UntypedStorage) -> bool:
        reference = self._storages.get(storage._cdata)
        return reference is not None and reference() is not None

    def now(self) -> int:
        """Bytes alive."""
        total = 0
        for key, reference in list(self._storages.items()):
            storage = reference()
            if storage is None:
                del self._storages[key]
            else:
                total += storage.nbytes()
        return total
