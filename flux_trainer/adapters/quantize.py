"""Linears that multiply in 8 bits, through torchao: float8 with a scale per tensor or per row, or mxfp8.

A linear has three products, for its output and for the gradients of its input and its weight. The operands of
each are divided by scales and rounded to 8 bits just before it; the products' sums and results are wide.
Nothing is stored so: weights, gradients, and what is kept for backward have the dtype that they have without.

    float8          one scale per tensor, its largest entry's: e4m3, gradients of outputs e5m2
    float8_rowwise  one scale per row of each operand, a power of two: e4m3
    mxfp8           one scale per 32 numbers along each row, a power of two: e4m3 (OCP's MX formats)

torchao swaps modules; here a linear stays the module that it is, and only its class changes, to one that has
torchao's `forward` and all else of its own. So names, checkpoints, sections of fused linears are unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from torch import nn

from flux_trainer.config.compute import EIGHT_BIT_MULTIPLE, Quantize
from flux_trainer.runtime.log import logger

_CAPABILITY = {"float8": (8, 9), "float8_rowwise": (9, 0), "mxfp8": (10, 0)}
"""From which of CUDA's compute capabilities on a device multiplies so."""
_SIDE = 32  # of the sample linear below; any size would do


def quantize_linears(model: nn.Module, section: Quantize) -> list[str]:
    """Let the chosen linears of `model` multiply in 8 bits, in place; logs and returns their names.

    Raises:
        ValueError: torchao is missing, the device cannot multiply so, or patterns or sizes do not fit.
    """
    if section.linears == "none":
        return []
    names = chosen(model, section)
    _check_device(section)
    plain, quantized = nn.Linear(_SIDE, _SIDE, device="meta"), _sample(section)
    settings = {key: value for key, value in vars(quantized).items() if key not in vars(plain)}
    linears = [model.get_submodule(name) for name in names]
    # One for each class, so that compiled blocks share a graph.
    classes = {cls: type(cls.__name__, (type(quantized), cls), {}) for cls in set(map(type, linears))}
    for linear in linears:
        linear.__class__ = classes[type(linear)]
        vars(linear).update(settings)
    kinds = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    how = f"{section.linears}, emulated" if section.emulate else section.linears
    logger.info(f"Linears in {how}: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}")
    return names


def chosen(model: nn.Module, section: Quantize) -> list[str]:
    """Names of the linears that match `filter` and not `skip`.

    Raises:
        ValueError: none does, a pattern matches none, or one has sides that 8-bit products do not take.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in section.filter:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(
                f'quantize.filter: "{pattern}" matches no linear of the model, whose names are such as '
                f'"{next(reversed(linears))}"'
            )
    names = [name for name in linears if _matches(name, section.filter) and not _matches(name, section.skip)]
    if not names:
        raise ValueError("quantize.skip leaves no linear of those that quantize.filter matches")
    multiple = EIGHT_BIT_MULTIPLE[section.linears]
    for name in names:
        linear = linears[name]
        if linear.in_features % multiple or linear.out_features % multiple:
            raise ValueError(
                f"{name} has {linear.in_features} inputs and {linear.out_features} outputs; "
                f'{section.linears} needs multiples of {multiple}. Add "{name}" to quantize.skip.'
            )
    return names


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_device(section: Quantize) -> None:
    if section.emulate:
        return
    needed = _CAPABILITY[section.linears]
    here = "there is none"
    if torch.cuda.is_available():
        there = torch.cuda.get_device_capability()
        if there >= needed:
            return
        here = f"{torch.cuda.get_device_name()} has {there[0]}.{there[1]}"
    raise ValueError(
        f'quantize.linears = "{section.linears}" needs a CUDA device of compute capability {needed[0]}.'
        f"{needed[1]}, and {here}; quantize.emulate = true rounds the same way, slowly, on any device."
    )


def _sample(section: Quantize) -> nn.Module:
    """A linear as torchao makes it."""
    if find_spec("torchao") is None:
        raise ValueError(
            f'quantize.linears = "{section.linears}" needs torchao; install it with '
            "pip install 'flux_trainer[quant]'."
        )
    linear = nn.Linear(_SIDE, _SIDE, device="meta")
    if section.linears == "mxfp8":
        from torchao.prototype.moe_training.mxfp8_linear import MXFP8Linear
        from torchao.quantization.quantize_.common import KernelPreference

        preference = KernelPreference.EMULATED if section.emulate else KernelPreference.AUTO
        return MXFP8Linear(_SIDE, _SIDE, device="meta", kernel_preference=preference)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = {"float8": "tensorwise", "float8_rowwise": "rowwise"}[section.linears]
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=section.emulate)
    return convert_to_float8_training(nn.Sequential(linear), config=config)[0]
