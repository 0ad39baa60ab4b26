"""Reads an autoencoder from disk: a file or folder of BFL's or diffusers' layout, with its config."""

from __future__ import annotations

from pathlib import Path

import torch

from flux_trainer.hub.detect import Place, locate
from flux_trainer.hub.families import FLUX1_AE
from flux_trainer.hub.load import fill
from flux_trainer.hub.weights import open_source, open_weights, stated_config
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig

DOWNLOAD = "hf download black-forest-labs/FLUX.1-dev ae.safetensors --local-dir assets/hf/FLUX.1-dev"


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> AutoEncoder:
    """The autoencoder at `path`, frozen, in eval mode, on the CPU.

    Args:
        path: a safetensors file in BFL's or diffusers' layout, such as FLUX.1's published `ae.safetensors`;
            diffusers' folder of an autoencoder, or of a pipeline. See `read_config` for its config.
        dtype: dtype of the parameters, whatever the file's.

    Raises:
        FileNotFoundError: nothing is there; the message has a command that brings FLUX.1's.
        ValueError: the file or its config is damaged, or does not hold exactly the parameters of the config.
    """
    place = _locate(path)
    config, origin = _config(place)
    weights = open_weights(place, "vae", config, origin=origin)
    with torch.device("meta"):
        model = AutoEncoder(config).to(dtype)
    model.to_empty(device="cpu")
    fill(weights, {name: p.detach() for name, p in model.named_parameters()})
    return model.requires_grad_(False).eval()


def read_config(path: str | Path) -> AutoEncoderConfig:
    """The config of the autoencoder at `path`: what it or a file beside it says (`stated_config`).

    Where neither says anything, or nothing is there, it is FLUX.1's.
    """
    try:
        return _config(_locate(path))[0]
    except FileNotFoundError:
        return AutoEncoderConfig()


def _config(place: Place) -> tuple[AutoEncoderConfig, str]:
    stated = stated_config(place, open_source(place), FLUX1_AE)
    return stated or (AutoEncoderConfig(), "FLUX.1's config (no file beside it has another)")


def _locate(path: str | Path) -> Place:
    try:
        return locate(path, "vae")
    except FileNotFoundError as error:
        path = Path(path)
        raise FileNotFoundError(
            f"There is no autoencoder {path.name} in {path.absolute().parent}. "
            f"FLUX.1's comes with `{DOWNLOAD}` (after accepting its licence on the Hugging Face hub)."
        ) from error
