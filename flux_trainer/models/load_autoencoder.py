"""Reads an autoencoder from disk: one safetensors file with BFL's names, and its config as JSON beside it."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig

DOWNLOAD = "hf download black-forest-labs/FLUX.1-dev ae.safetensors --local-dir assets/hf/FLUX.1-dev"


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    """The autoencoder in `path`, frozen, in eval mode, on the CPU.

    Args:
        path: a safetensors file in BFL's layout, such as FLUX.1's published `ae.safetensors`. Its config is
            read from the JSON file of the same stem beside it (`ae.json`); without one it is FLUX.1's.
        dtype: dtype of the parameters, whatever the file's.

    Raises:
        FileNotFoundError: the file does not exist; the message has a command that brings FLUX.1's.
        ValueError: the file or its config is damaged, or does not hold exactly the parameters of the config.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no autoencoder {path.name} in {path.absolute().parent}. "
            f"FLUX.1's comes with `{DOWNLOAD}` (after accepting its licence on the Hugging Face hub)."
        )
    config, origin = read_config(path)
    weights = _read_weights(path)
    with torch.device("meta"):
        model = AutoEncoder(config)
    _check(weights, model.state_dict(), path, origin)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def read_config(path: Path) -> tuple[AutoEncoderConfig, str]:
    """The config that belongs to the weights in `path`, and in words where it comes from."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return AutoEncoderConfig(), f"FLUX.1's (there is no {beside.name} beside the weights)"
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{beside} is not valid JSON: {error}.") from error
    known = [field.name for field in fields(AutoEncoderConfig)]
    if not isinstance(values, dict) or set(values) - set(known):
        wrong = sorted(set(values) - set(known)) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{beside} must be an object with the fields {', '.join(known)}; it has {wrong}.")
    return AutoEncoderConfig(**values), f"that of {beside.name}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}. Fetch it again.") from error


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path, origin: str) -> None:
    """Raise ValueError unless `found` has exactly the names and shapes of `expected`."""
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "misshapen": misshapen,
    }
    described = [f"{len(names)} {kind} ({_some(names)})" for kind, names in problems.items() if names]
    if described:
        raise ValueError(
            f"{path} does not fit the autoencoder's config, which is {origin}: {'; '.join(described)}. "
            "Weights in Black Forest Labs' layout are needed, with names like encoder.conv_in.weight."
        )


def _some(names: list[str], count: int = 5) -> str:
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown}, and {len(names) - count} more"
