"""What parameters are called in other layouts: one declarative table per family, read in both directions.

Names and row order of Black Forest Labs (BFL) are native. A table maps each native module to diffusers'; from
it and the model itself, `entries` makes the whole correspondence, tensor by tensor and row by row. Whoever
reads or writes a layout goes through `Entry`; nobody else knows how names, rows and shapes differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import nn

from flux_trainer.models.layers import FusedLinear

Layout = Literal["bfl", "torchtitan", "diffusers"]
"""bfl: native. torchtitan: native, but a norm's `.scale` is called `.weight`. diffusers: by the table."""


class Swapped(NamedTuple):
    """The two halves of the rows change places: BFL's (shift, scale) is diffusers' (scale, shift)."""

    name: str


class AsLinear(NamedTuple):
    """A 1x1 convolution here, a linear there: the same numbers without the trailing dimensions."""

    name: str


Table = Mapping[str, str | dict[str, str] | Swapped | AsLinear]
"""Native module -> diffusers' module, or one for each section of a fused linear.

`*` stands for a number, the same on both sides; `~` on the right for the same one counted from the other end.
"""


def _embedder(native: str, diffusers: str) -> Table:
    return {f"{native}.in_layer": f"{diffusers}.linear_1", f"{native}.out_layer": f"{diffusers}.linear_2"}


def _stream(
    native: str, ff: str, ff_layers: Sequence[str], qkv: Sequence[str], qk_norm: Sequence[str], proj: str
) -> Table:
    """One of the two streams of a double block."""
    here, there = f"double_blocks.*.{native}", "transformer_blocks.*"
    return {
        f"{here}_attn.qkv": {x: f"{there}.attn.{name}" for x, name in zip("qkv", qkv, strict=True)},
        f"{here}_attn.norm.query_norm": f"{there}.attn.{qk_norm[0]}",
        f"{here}_attn.norm.key_norm": f"{there}.attn.{qk_norm[1]}",
        f"{here}_attn.proj": f"{there}.attn.{proj}",
        f"{here}_mlp.0": f"{there}.{ff}.{ff_layers[0]}",
        f"{here}_mlp.2": f"{there}.{ff}.{ff_layers[1]}",
    }


def _transformer(embed: str, ff_layers: Sequence[str]) -> Table:
    """What all families have in common."""
    return {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        **_embedder("time_in", f"{embed}.timestep_embedder"),
        **_embedder("guidance_in", f"{embed}.guidance_embedder"),
        **_stream("img", "ff", ff_layers, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"),
        **_stream(
            "txt",
            "ff_context",
            ff_layers,
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
        ),
        "single_blocks.*.norm.query_norm": "single_transformer_blocks.*.attn.norm_q",
        "single_blocks.*.norm.key_norm": "single_transformer_blocks.*.attn.norm_k",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": Swapped("norm_out.linear"),
    }


FLUX1: Table = {
    **_transformer("time_text_embed", ("net.0.proj", "net.2")),
    **_embedder("vector_in", "time_text_embed.text_embedder"),
    "double_blocks.*.img_mod.lin": "transformer_blocks.*.norm1.linear",
    "double_blocks.*.txt_mod.lin": "transformer_blocks.*.norm1_context.linear",
    "single_blocks.*.modulation.lin": "single_transformer_blocks.*.norm.linear",
    "single_blocks.*.linear1": {
        "q": "single_transformer_blocks.*.attn.to_q",
        "k": "single_transformer_blocks.*.attn.to_k",
        "v": "single_transformer_blocks.*.attn.to_v",
        "mlp": "single_transformer_blocks.*.proj_mlp",
    },
    "single_blocks.*.linear2": "single_transformer_blocks.*.proj_out",
}

FLUX2: Table = {
    **_transformer("time_guidance_embed", ("linear_in", "linear_out")),
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "single_blocks.*.linear1": "single_transformer_blocks.*.attn.to_qkv_mlp_proj",  # fused there too
    "single_blocks.*.linear2": "single_transformer_blocks.*.attn.to_out",
}


def _resnet(native: str, diffusers: str) -> Table:
    same = {f"{native}.{name}": f"{diffusers}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return {**same, f"{native}.nin_shortcut": f"{diffusers}.conv_shortcut"}


def _half(coder: str) -> Table:
    """What encoder and decoder have in common."""
    attention, there = f"{coder}.mid.attn_1", f"{coder}.mid_block.attentions.0"
    return {
        f"{coder}.conv_in": f"{coder}.conv_in",
        **_resnet(f"{coder}.mid.block_1", f"{coder}.mid_block.resnets.0"),
        f"{attention}.norm": f"{there}.group_norm",
        f"{attention}.q": AsLinear(f"{there}.to_q"),
        f"{attention}.k": AsLinear(f"{there}.to_k"),
        f"{attention}.v": AsLinear(f"{there}.to_v"),
        f"{attention}.proj_out": AsLinear(f"{there}.to_out.0"),
        **_resnet(f"{coder}.mid.block_2", f"{coder}.mid_block.resnets.1"),
        f"{coder}.norm_out": f"{coder}.conv_norm_out",
        f"{coder}.conv_out": f"{coder}.conv_out",
    }


FLUX1_AE: Table = {
    **_half("encoder"),
    **_resnet("encoder.down.*.block.*", "encoder.down_blocks.*.resnets.*"),
    "encoder.down.*.downsample.conv": "encoder.down_blocks.*.downsamplers.0.conv",
    **_half("decoder"),
    **_resnet("decoder.up.*.block.*", "decoder.up_blocks.~.resnets.*"),  # BFL's up.0 comes last
    "decoder.up.*.upsample.conv": "decoder.up_blocks.~.upsamplers.0.conv",
}

FLUX2_AE: Table = {
    **FLUX1_AE,
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    "bn": "bn",
}


@dataclass(frozen=True)
class Run:
    """Rows of a native tensor that lie together in a tensor of another layout."""

    name: str
    """Of that tensor."""
    start: int
    """The first of the rows there."""
    native: int
    """The first of the rows in the native tensor."""
    length: int


@dataclass(frozen=True)
class Entry:
    """Where the elements of a native tensor lie in another layout."""

    shape: tuple[int, ...]
    """Of the native tensor."""
    ndim: int
    """Dimensions there: fewer where trailing ones are left out."""
    runs: tuple[Run, ...]
    """In the order of the native rows, which they cover. A scalar counts as one row."""

    def within(self, start: int, stop: int) -> Iterator[Run]:
        """The native rows from `start` to `stop`, as the runs they lie in there."""
        for run in self.runs:
            first, last = max(start, run.native), min(stop, run.native + run.length)
            if first < last:
                yield Run(run.name, run.start + first - run.native, first, last - first)


Entries = Mapping[str, Entry]
"""By native name, all parameters and persistent buffers of a model."""


def entries(model: nn.Module, table: Table, layout: Layout) -> dict[str, Entry]:
    """Every parameter and persistent buffer of `model` in `layout`, in the order of its state dict.

    The model may lie on the meta device.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        shape, rows = tuple(tensor.shape), tensor.shape[0] if tensor.ndim else 1
        owner, _, leaf = name.rpartition(".")
        if layout == "diffusers":
            target = _target(model, table, owner)
            leaf = _as_weight(leaf)
            if isinstance(target, dict):
                module = model.get_submodule(owner)
                assert isinstance(module, FusedLinear), name
                assert module.rows.keys() == target.keys(), name
                runs, begin = [], 0
                for section, size in module.rows.items():
                    runs.append(Run(f"{target[section]}.{leaf}", 0, begin, size))
                    begin += size
                found[name] = Entry(shape, len(shape), tuple(runs))
            elif isinstance(target, Swapped):
                there, half = f"{target.name}.{leaf}", rows // 2
                assert rows == 2 * half, f"{name} has no halves"
                found[name] = Entry(shape, len(shape), (Run(there, half, 0, half), Run(there, 0, half, half)))
            elif isinstance(target, AsLinear):
                assert set(shape[2:]) <= {1}, f"{name} is no 1x1 convolution"
                found[name] = Entry(shape, min(len(shape), 2), (Run(f"{target.name}.{leaf}", 0, 0, rows),))
            else:
                found[name] = Entry(shape, len(shape), (Run(f"{target}.{leaf}", 0, 0, rows),))
        else:
            there = f"{owner}.{leaf if layout == 'bfl' else _as_weight(leaf)}"
            found[name] = Entry(shape, len(shape), (Run(there, 0, 0, rows),))
    return found


def shapes(entries: Entries) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in the layout of `entries`."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries.values():
        for run in entry.runs:
            before = found[run.name][0] if run.name in found else 0
            found[run.name] = (before + run.length, *entry.shape[1:])[: entry.ndim]
    return found


def sources(entries: Entries) -> dict[str, list[tuple[str, Run]]]:
    """For each tensor in the layout of `entries`: (native name, run) of its rows, in their order there."""
    found: dict[str, list[tuple[str, Run]]] = {}
    for native, entry in entries.items():
        for run in entry.runs:
            found.setdefault(run.name, []).append((native, run))
    return {name: sorted(parts, key=lambda part: part[1].start) for name, parts in found.items()}


def pattern(name: str) -> str:
    """A dotted name with `*` for each number."""
    return ".".join("*" if part.isdigit() or part == "~" else part for part in name.split("."))


def modules(table: Table, layout: Layout) -> set[str]:
    """Patterns of the modules that `table` knows, by which a file's layout is recognised."""
    if layout != "diffusers":
        return {pattern(native) for native in table}
    names: set[str] = set()
    for target in table.values():
        names |= set(target.values()) if isinstance(target, dict) else {getattr(target, "name", str(target))}
    return {pattern(name) for name in names}


def native_leaf(name: str) -> str:
    """The native name of a norm's scale that torchtitan and ComfyUI call `.weight`; others unchanged."""
    return re.sub(r"((?:query|key)_norm)\.weight$", r"\1.scale", name)


def _as_weight(leaf: str) -> str:
    return "weight" if leaf == "scale" else leaf


@lru_cache
def _expression(native: str) -> re.Pattern[str]:
    return re.compile(re.escape(native).replace(r"\*", r"(\d+)"))


def _target(model: nn.Module, table: Table, module: str) -> str | dict[str, str] | Swapped | AsLinear:
    """What the table says of a module, with its numbers filled in."""
    for native, target in table.items():
        if match := _expression(native).fullmatch(module):
            numbers = []
            for i, text in enumerate(match.groups(), start=1):
                siblings = model.get_submodule(module[: match.start(i) - 1])
                assert isinstance(siblings, nn.ModuleList)
                numbers.append((text, str(len(siblings) - 1 - int(text))))
            if isinstance(target, dict):
                return {section: _fill(name, numbers) for section, name in target.items()}
            if isinstance(target, str):
                return _fill(target, numbers)
            return type(target)(_fill(target.name, numbers))
    raise AssertionError(f"no table entry for {module}")


def _fill(name: str, numbers: list[tuple[str, str]]) -> str:
    remaining = iter(numbers)
    return re.sub(r"[*~]", lambda match: next(remaining)[match.group() == "~"], name)
