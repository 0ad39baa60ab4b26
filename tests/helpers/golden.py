"""Golden files of Black Forest Labs' models, and how near they have to be met.

BFL's code and diffusers compute the frequencies of timesteps by float32's exp, whose last bits depend on the
machine: at guidance 3.5 one bit turns an angle by 2e-4, and outputs move by as much. Comparisons to 2e-5
therefore use the reference's own frequencies (`use_frequencies`); how far ours are from them is tested in
`tests/models/test_sinusoids.py`.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flux_trainer.models import sinusoids
from flux_trainer.models.configs import TIME_DIM

GOLDEN = Path(__file__).parents[1] / "golden"


def load_case(case: str, model: Any, config: Any, file: str = "io") -> tuple[Any, dict[str, Tensor]]:
    """A model with its golden weights, and the tensors of one of its files."""
    built = model(config(**json.loads((GOLDEN / case / "config.json").read_text())["bfl"]))
    built.load_state_dict(load_file(GOLDEN / case / "weights_bfl.safetensors"), strict=True)
    return built, load_file(GOLDEN / case / f"{file}.safetensors")


def recorded_frequencies() -> Tensor:
    """float32 [128]: those of the machine that wrote the golden files."""
    return load_file(GOLDEN / "frequencies.safetensors")["timesteps"]


def float32_frequencies() -> Tensor:
    """float32 [128]: as BFL's code and diffusers compute them, on this machine."""
    return torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)


def use_frequencies(monkeypatch: Any, table: Tensor) -> None:
    """Let timesteps be embedded by the frequencies `table` [128]."""
    own = sinusoids.frequencies

    def frequencies(dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
        return table.to(device, torch.float64) if dim == TIME_DIM else own(dim, base, device)

    monkeypatch.setattr(sinusoids, "frequencies", frequencies)


def key_maps() -> dict[str, Any]:
    """Of each published model: `native` names and shapes, and what `diffusers` makes of them."""
    maps: dict[str, Any] = {}
    for family in ("flux1", "flux2"):
        maps |= json.loads(gzip.decompress((GOLDEN / f"{family}_key_maps.json.gz").read_bytes()))
    return maps


def gradients(case: str) -> dict[str, Tensor]:
    """By native name, of every parameter."""
    return load_file(GOLDEN / case / "grads_bfl.safetensors")


def record(model: Any) -> dict[str, Tensor]:
    """Activations by their golden names, once the model has run."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if isinstance(output, tuple):
                seen[f"{name}.img"], seen[f"{name}.txt"] = output
            else:
                seen[name] = output

        return hook

    for name, module in [("img_in", model.img_in), ("txt_in", model.txt_in), *model.blocks()]:
        module.register_forward_hook(keep(name))
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.update(vec=args[1]))
    return seen


def assert_activations(seen: dict[str, Tensor], io: dict[str, Tensor]) -> None:
    """All but the rotary tables."""
    expected = {key.removeprefix("act."): value for key, value in io.items() if key.startswith("act.")}
    expected = {name: value for name, value in expected.items() if not name.startswith("pe")}
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_within(actual: Tensor, expected: Tensor, name: str) -> None:
    """Largest difference at most 2e-5 of the largest entry."""
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * largest, f"{name}: off by {error:.2e}, largest entry {largest:.2e}"


def as_matrices(table: Tensor) -> Tensor:
    """Our [B, L, 1, D/2, 2] as BFL's rotation matrices [B, 1, L, D/2, 2, 2]."""
    cos, sin = table.transpose(1, 2).unbind(-1)
    return torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
