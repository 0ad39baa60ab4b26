"""Reads an autoencoder from disk: a file or folder of BFL's or diffusers' layout, with its config."""

from __future__ import annotations

from pathlib import Path

import torch

from flux_trainer.hub.detect import Place, locate
from flux_trainer.hub.families import FAMILIES, family_of
from flux_trainer.hub.load import fill
from flux_trainer.hub.weights import open_source, open_weights, recognise, stated_config
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config

AnyAutoEncoder = AutoEncoder | AutoEncoder2
AnyConfig = AutoEncoderConfig | AutoEncoder2Config

_FAMILIES = [family for family in FAMILIES if family.component == "vae"]

DOWNLOAD = "hf download black-forest-labs/{0} ae.safetensors --local-dir assets/hf/{0}"


def load_autoencoder(path: str | Path, dtype: torch.dtype = torch.float32) -> AnyAutoEncoder:
    """The autoencoder at `path`, frozen, in eval mode, on the CPU.

    Args:
        path: a safetensors file in BFL's or diffusers' layout, such as FLUX.1's or FLUX.2's published
            `ae.safetensors`; diffusers' folder of an autoencoder, or of a pipeline. The names in it tell
            which of the two it is; see `read_config` for its config.
        dtype: dtype of the parameters and statistics, whatever the file's.

    Raises:
        FileNotFoundError: nothing is there; the message has commands that bring the published ones.
        ValueError: the file or its config is damaged, or does not hold exactly the tensors of the config.
    """
    place = _locate(path)
    config, origin = _config(place)
    weights = open_weights(place, "vae", config, origin=origin)
    with torch.device("meta"):
        model: AnyAutoEncoder = build(config).to(dtype)
    model.to_empty(device="cpu")
    fill(weights, model.state_dict())
    return model.requires_grad_(False).eval()


def build(config: AnyConfig) -> AnyAutoEncoder:
    """The autoencoder that `config` describes."""
    model = family_of(config).model(config)
    assert isinstance(model, AnyAutoEncoder)
    return model


def read_config(path: str | Path, default: AnyConfig) -> AnyConfig:
    """The config of the autoencoder at `path`: what it or a file beside it says (`stated_config`).

    Where neither says anything it is the published one of the family that the names tell; where nothing is
    there, `default`.
    """
    try:
        return _config(_locate(path))[0]
    except FileNotFoundError:
        return default


def _config(place: Place) -> tuple[AnyConfig, str]:
    source = open_source(place, "vae")
    family, _, _ = recognise(place, source, "vae", _FAMILIES)
    (published,) = family.flavors.values()
    name = family.title.removesuffix(" autoencoder")
    stated = stated_config(place, source, family)
    return stated or (published, f"{name}'s config (no file beside it has another)")


def _locate(path: str | Path) -> Place:
    try:
        return locate(path, "vae")
    except FileNotFoundError as error:
        path = Path(path)
        raise FileNotFoundError(
            f"There is no autoencoder {path.name} in {path.absolute().parent}. FLUX.1's comes with "
            f"`{DOWNLOAD.format('FLUX.1-dev')}`, FLUX.2's with `{DOWNLOAD.format('FLUX.2-dev')}` "
            "(after accepting its licence on the Hugging Face hub)."
        ) from error
