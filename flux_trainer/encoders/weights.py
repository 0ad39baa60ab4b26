"""Building a frozen text encoder: on the meta device, sharded, and only then filled tensor by tensor.

No process ever holds more than its own shards and one whole tensor, whatever the dtype of the file. Values
come from safetensors files (pickles are refused: they can run code), or, for tests and demonstrations, from a
keyed random generator: the same on every rank, for any number of ranks, on any version of transformers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flux_trainer.flow.rng import Purpose, uniform

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHT_FILES = ("config.json", INDEX, SINGLE, "model-*-of-*.safetensors")

Values = Callable[[str, torch.Size], Tensor]
"""The value of a parameter, by its name in the module and its shape, in any float dtype, on any device."""

Model = TypeVar("Model", bound=nn.Module)


def build(make: Callable[[], Model], dtype: torch.dtype) -> Model:
    """A model without memory (meta device), in `dtype`, frozen and in eval mode."""
    with torch.device("meta"):
        model = make()
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def fill(model: nn.Module, values: Values, device: torch.device) -> None:
    """Give a (sharded) meta model memory on `device` and set every parameter from `values`."""
    shared = _shared_parameters(model)
    model.to_empty(device=device)
    for alias, name in shared.items():  # to_empty makes two parameters of one
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
    for name, buffer in model.named_buffers():
        assert name.endswith("position_ids"), f"unknown buffer {name}"  # CLIP's only one: 0, 1, 2, ...
        buffer.copy_(torch.arange(buffer.shape[-1]))
    for name, parameter in model.named_parameters():
        value = values(name, parameter.shape).to(parameter.dtype)
        if isinstance(
            parameter, DTensor
        ):  # every rank has the whole value and cuts its part: no communication
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Name -> first name of each parameter that a model uses under several names (T5's embedding)."""
    first: dict[int, str] = {}
    names = ((name, id(p)) for name, p in model.named_parameters(remove_duplicate=False))
    return {name: first[key] for name, key in names if first.setdefault(key, name) != name}


class Checkpoint:
    """`Values` from the safetensors files of a folder, as transformers and diffusers write them."""

    def __init__(self, folder: Path, key: str, hint: str) -> None:
        """Open `folder`; `key` is the setting it comes from, `hint` says how to get the files.

        Raises FileNotFoundError where one is missing.
        """
        self.folder = folder
        self.hint = hint
        self.files: dict[str, Any] = {}  # file name -> open safetensors file (mapped, not read)
        if (folder / INDEX).is_file():
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
            for file in sorted(set(weight_map.values())):
                self._open(file, f" (named in {INDEX})")
        elif (folder / SINGLE).is_file():
            self._open(SINGLE, "")
        else:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            found = f"It has {pickles[0]}, but a pickle can run code and is never loaded. " if pickles else ""
            raise FileNotFoundError(f"No {SINGLE} in {folder.absolute()} ({key}). {found}{hint}")
        self.where = {name: file for file, handle in self.files.items() for name in handle.keys()}  # noqa: SIM118

    def _open(self, file: str, named: str) -> None:
        from safetensors import safe_open

        if not (self.folder / file).is_file():
            raise FileNotFoundError(f"No {file}{named} in {self.folder.absolute()}. {self.hint}")
        self.files[file] = safe_open(self.folder / file, framework="pt")

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """Raises ValueError where the files lack a tensor or have it in another shape."""
        stored = next((other for other in _names(name) if other in self.where), None)
        if stored is None:
            raise ValueError(f"The safetensors files in {self.folder.absolute()} have no tensor {name!r}.")
        value: Tensor = self.files[self.where[stored]].get_tensor(stored)
        if value.shape != shape:
            raise ValueError(
                f"{stored!r} in {self.folder.absolute() / self.where[stored]} is {list(value.shape)}, "
                f"but by config.json beside it {list(shape)} is needed."
            )
        return value


# What may stand in front of a parameter's name in files of whole models: CLIP with its image half, language
# models with their output layer, and Mistral 3 with its vision tower, in the styles of several years.
PREFIXES = (
    "",
    "text_model.",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
)


def _names(name: str) -> tuple[str, ...]:
    """The names under which a parameter may be stored; the first does not depend on transformers' version.

    CLIP's text model stands alone in some files and in transformers 5, under `text_model.` in others and in
    transformers 4. T5 has one embedding under two names.
    """
    if name in {"shared.weight", "encoder.embed_tokens.weight"}:
        return ("shared.weight", "encoder.embed_tokens.weight")
    bare = name.removeprefix("text_model.")
    return tuple(prefix + bare for prefix in PREFIXES)


def random_values(seed: int, device: torch.device, query_scale: float = 1.0) -> Values:
    """`Values` drawn on `device`: matrices of variance 1/fan_in, embeddings of variance 1; norms 1, biases 0.

    They are uniform, which costs less than normal and serves as well. `query_scale` multiplies T5's query
    matrices: T5 does not divide q k^T by sqrt(d), its weights do.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        name = _names(name)[0]
        tables = ("shared.weight", "embedding", "embed_tokens", "relative_attention_bias")
        embedding = any(table in name for table in tables)
        std = 1.0 if embedding else shape[1] ** -0.5
        if name.endswith(".q.weight"):
            std *= query_scale
        draw = torch.tensor([zlib.crc32(name.encode())], device=device)  # keyed by name
        unit = uniform(seed, Purpose.ENCODER, draw, shape)[0]  # variance 1/12 about 1/2
        return (unit - 0.5) * (std * 12**0.5)

    return value
