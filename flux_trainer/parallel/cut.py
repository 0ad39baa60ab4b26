"""Cutting a model into parts that run one after another.

A model is embedders, blocks, and a head. Its `forward` goes on from `state`, what the part before returned,
where it has no embedders, and returns its own where it has no head (`FluxModel.forward`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection

from flux_trainer.models.model import FluxModel


def take(model: FluxModel, blocks: Collection[int], *, embedders: bool, head: bool) -> FluxModel:
    """A copy of `model` with these of its blocks, with or without what comes before and after them.

    Parameters keep their names. The model says by `blocks()` which blocks it has, by `HEAD` what comes after.
    """
    part = copy.deepcopy(model)
    names = [name for name, _ in part.blocks()]
    for index, name in enumerate(names):
        if index not in blocks:
            parent, _, number = name.rpartition(".")
            delattr(part.get_submodule(parent), number)
    lists = {name.partition(".")[0] for name in names}
    for name, _ in list(part.named_children()):
        if name not in lists and not (head if name in model.HEAD else embedders):
            setattr(part, name, None)
    return part
