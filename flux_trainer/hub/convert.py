"""Weights from one layout to another, tensor by tensor: memory for a few of them, not for the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_trainer.checkpoint import commit
from flux_trainer.checkpoint.commit import METADATA, STATE
from flux_trainer.checkpoint.tensors import stream_tensors
from flux_trainer.hub.contents import INDEX_SUFFIX, NOTE
from flux_trainer.hub.detect import STEM
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.source import Extent, Stored
from flux_trainer.hub.target import Format, check_target, existing_parent, replacing
from flux_trainer.hub.weights import Weights, note
from flux_trainer.hub.write import write_safetensors
from flux_trainer.models import keys
from flux_trainer.runtime.files import ensure_space, sync, write_json

SHARD = 5_000_000_000  # bytes of a file in a diffusers folder, unless one tensor is larger

_BLOCK = 8 * 2**20  # bytes that are read, cast and written at once

Progress = Callable[[int, int], None]
"""Called with the bytes written so far, and all there are."""


class Conversion:
    """What a model's tensors are in another layout and dtype, and their values, block by block."""

    def __init__(self, weights: Weights, layout: keys.Layout, dtype: torch.dtype | None) -> None:
        """dtype: of all tensors but counters; None: each keeps its own."""
        self.weights = weights
        entries = weights.family.entries(weights.config, layout)
        self._parts = keys.sources(entries)
        self.tensors: dict[str, Stored] = {}
        """In the order of writing: as the model's parameters."""
        for name, shape in keys.shapes(entries).items():
            asked = None if name in weights.family.counters else dtype
            self.tensors[name] = Stored(shape, asked or self._kept_dtype(name))

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.tensors.values())

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Extent | None]]:
        """The tensor's rows in order, contiguous, at most `_BLOCK` bytes or a row at once.

        With each block, where the same bytes lie in a file, if they do.
        """
        stored = self.tensors[name]
        for native, run in self._parts[name]:
            shape = self.weights.entries[native].shape
            rows = max(1, _BLOCK // (4 * prod(shape[1:])))
            for first in range(run.native, run.native + run.length, rows):
                count = min(rows, run.native + run.length - first)
                for values, extent in self.weights.rows(native, first, count):
                    same = values.dtype == stored.dtype
                    yield cast(values, stored.dtype, name).contiguous(), extent if same else None

    def whole(self, name: str) -> Tensor:
        """The tensor, cast block by block: a source may hold another whole one beside it, and no more."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        flat, done = tensor.view(-1), 0
        for block, _ in self.blocks(name):
            flat[done : done + block.numel()] = block.view(-1)
            done += block.numel()
        return tensor

    def _kept_dtype(self, name: str) -> torch.dtype:
        """The narrowest that holds the values of all tensors that it is made of."""
        found: set[torch.dtype] = set()
        for native, run in self._parts[name]:
            for there in self.weights.entries[native].within(run.native, run.native + run.length):
                found.add(self.weights.source.tensors[self.weights.names[there.name]].dtype)
        if len(found) == 1:
            return found.pop()
        # torch promotes no float8, whose values every wider dtype holds.
        return reduce(torch.promote_types, {d for d in found if d.itemsize > 1} or {torch.bfloat16})


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in `dtype`; WeightsError where a finite value is too large for it."""
    if values.dtype == dtype:
        return values
    result = values.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(values.dtype).max:
        finite = result.float().isfinite() if dtype.itemsize == 1 else result.isfinite()
        if not finite.all() and not finite[values.isfinite()].all():
            largest = values[values.isfinite()].abs().max().item()
            raise WeightsError(
                f"{name} has values up to {largest:.4g}, which {str(dtype)[6:]} cannot hold (its largest is "
                f"{torch.finfo(dtype).max:.4g}). Write --dtype bf16 or fp32."
            )
    return result


def convert(
    weights: Weights,
    target: str | Path,
    to: Format,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
    shard: int = SHARD,
    progress: Progress = lambda done, total: None,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write `weights` in another format at `target`, which appears when all of it is on the disk, or never.

    Args:
        weights: opened with `ahead`.
        dtype: of all tensors; None: each keeps its own.
        overwrite: replace weights that are at `target` already.
        shard: bytes of a file in diffusers' layout.
        before: called when nothing is left that `target` could be refused for; nothing is written by then.

    Raises:
        WeightsError: `target` is taken or unfit, or the format or dtype cannot hold these weights.
        OSError: it cannot be written; a disk that is too full is noticed before anything is written.
    """
    target = check_target(Path(target), to, overwrite)
    layout: keys.Layout = "diffusers" if to == "diffusers" else "torchtitan" if to == "torchtitan" else "bfl"
    config_json = _diffusers_config(weights) if to == "diffusers" else {}
    if to == "torchtitan":
        _refuse_torchtitan(weights)
    plan = Conversion(weights, layout, dtype)
    ensure_space(existing_parent(target), plan.nbytes + 4096 * len(plan.tensors))
    before()
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        progress(done, plan.nbytes)

    metadata = {NOTE: json.dumps(note(weights.config))}
    with replacing(target) as path:
        if to == "bfl":
            write_safetensors(path, plan.tensors, plan.blocks, metadata, tell)
        elif to == "diffusers":
            path.mkdir()
            _write_shards(path, plan, shard, metadata, tell)
            write_json(path / "config.json", config_json)
        else:
            path.mkdir()
            _write_dcp(path, plan, tell)
            if to == "dcp":
                write_json(path / STATE, {"step": 0, "model": note(weights.config)})
                files = commit.seal(path, "__*") | commit.seal(path, STATE) | commit.seal(path, METADATA)
                commit.write_manifest(path, 0, files)
            else:
                for file in path.iterdir():
                    sync(file)


def _refuse_torchtitan(weights: Weights) -> None:
    if not weights.family.in_torchtitan:
        raise WeightsError(f"torchtitan has no {weights.family.title}. Write --to dcp, bfl or diffusers.")
    if lost := [name for name in weights.entries if name.startswith("guidance_in.")]:
        raise WeightsError(
            f"torchtitan's FLUX model has no guidance embedding, so {len(lost)} tensors of these weights "
            "(guidance_in) would be lost there. Write --to dcp, bfl or diffusers."
        )


def _diffusers_config(weights: Weights) -> dict[str, Any]:
    try:
        return weights.family.diffusers.json(weights.config)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _write_shards(
    path: Path, plan: Conversion, limit: int, metadata: dict[str, str], tell: Callable[[int], None]
) -> None:
    """Files of at most `limit` bytes, and the index that diffusers wants of more than one."""
    shards: list[dict[str, Stored]] = [{}]
    size = 0
    for name, stored in plan.tensors.items():
        if shards[-1] and size + stored.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = stored
        size += stored.nbytes
    names = [f"{STEM}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{STEM}.safetensors"]
    for name, tensors in zip(names, shards, strict=True):
        write_safetensors(path / name, tensors, plan.blocks, metadata, tell)
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(path / f"{STEM}{INDEX_SUFFIX}", index)


def _write_dcp(path: Path, plan: Conversion, tell: Callable[[int], None]) -> None:
    outlines = {
        name: torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        for name, stored in plan.tensors.items()
    }

    def read(name: str) -> Tensor:
        tell(plan.tensors[name].nbytes)
        return plan.whole(name)

    stream_tensors(path, outlines, read)
