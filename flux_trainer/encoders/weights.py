"""Building a frozen text encoder: on the meta device, sharded, and only then filled tensor by tensor.

No process ever holds more than its own shards and one whole tensor, whatever the dtype of the file. Values
come from safetensors files (pickles are refused: they can run code), or, for tests and demonstrations, from a
keyed random generator: the same on every rank, for any number of ranks, on any version of transformers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flux_trainer.flow.rng import Purpose, uniform
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.plain import Part, encoder_contents
from flux_trainer.hub.safetensors_files import SafetensorsFiles

WEIGHT_FILES = (
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
)
"""What is fetched from the hub; a local folder may hold a variant under other names."""

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

    def __init__(self, folder: Path, part: Part, key: str, hint: str) -> None:
        """Open `folder`; `key` is the setting it comes from, `hint` says how to get the files.

        Raises WeightsError where a file is missing or damaged, or holds no plain weights of such an encoder.
        """
        try:
            self.source = SafetensorsFiles(encoder_contents(folder, part))
        except WeightsError as error:
            raise WeightsError(f"{key}: {error} {hint}") from error

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        """Raises ValueError where the files lack a tensor or have it in another shape."""
        tensors, path = self.source.tensors, self.source.path.absolute()
        stored = next((other for other in _names(name) if other in tensors), None)
        if stored is None:
            raise ValueError(f"{path} has no tensor {name!r}, which config.json next to it asks for.")
        if tensors[stored].shape != shape:
            raise ValueError(
                f"{stored!r} in {path} is {list(tensors[stored].shape)}, "
                f"but by config.json beside it {list(shape)} is needed."
            )
        return self.source.read(stored, (0,) * len(shape), shape)


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
