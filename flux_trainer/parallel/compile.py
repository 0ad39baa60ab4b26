"""torch.compile of blocks and loss. Blocks of one kind share a graph: the cost does not grow with depth.

A kind of block is compiled for the first resolution, and once more for all others when a second one is met.
Without gradients (validation, pictures) the same happens on its own, and a single sample, a size that the
compiler always sets apart, has graphs of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flux_trainer.config.compute import Compile


def compile_blocks(blocks: Iterable[nn.Module], section: Compile) -> None:
    """Compile each block's `forward` without graph breaks, in place. FSDP's hooks stay outside.

    What has replaced `forward` before (checkpointing) is left out where there are no gradients.
    """
    if section.enable and "model" in section.components:
        from torch._dynamo import config as compiler  # half a second: not for who compiles nothing

        # Every image size, and training apart from validation, is a graph of its own; torch's 8 would be few.
        compiler.recompile_limit = max(compiler.recompile_limit, 64)
        for index, block in enumerate(blocks):
            plain = MethodType(_namesake(type(block).forward), block)
            train, infer = (
                torch.compile(forward, backend=section.backend, fullgraph=True)
                for forward in (block.forward, plain)
            )
            block.forward = partial(_run, train, infer, index == 0)


def _run(train: Callable[..., Any], infer: Callable[..., Any], is_first: bool, *args: Tensor) -> Any:
    if is_first:  # embedders return views, and a graph for views would serve no other block
        args = tuple(x.clone() if x._is_view() else x for x in args)
    return (train if torch.is_grad_enabled() else infer)(*args)


@cache
def _namesake(function: Any) -> Any:
    """The same function as another piece of code: the compiler learns from calls of one piece which lengths
    vary, and the sizes of pictures must not make training's graphs general ones."""
    name = f"{function.__name__}_without_gradients"
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


def compile_loss(loss: Callable[..., Tensor], section: Compile) -> Callable[..., Tensor]:
    """`loss`, compiled if the settings say so."""
    if section.enable and "loss" in section.components:
        return torch.compile(loss, backend=section.backend, fullgraph=True)
    return loss
