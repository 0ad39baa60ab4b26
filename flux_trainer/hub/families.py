"""The models whose weights can be read and written, one line each: what a format needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from flux_trainer.hub import diffusers_config, infer
from flux_trainer.models import keys, registry
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.flux1 import Flux1Model

Component = Literal["transformer", "vae"]
"""diffusers' names of a pipeline's parts, and of their folders."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    title: str
    component: Component
    config: Callable[..., Any]
    """The class of its configs, a dataclass."""
    model: Callable[[Any], nn.Module]
    table: keys.Table
    flavors: Mapping[str, Any]
    """Name -> config."""
    diffusers: diffusers_config.Translation
    infer: Callable[[Shapes], Any | None]
    """The config of native parameters with such shapes, as far as shapes tell it."""
    prefixes: tuple[str, ...]
    """What ComfyUI's files put before the native names; other parts of a pipeline lie beside them."""

    def entries(self, config: Any, layout: keys.Layout) -> dict[str, keys.Entry]:
        """Every parameter of the model that `config` describes, in `layout`."""
        with torch.device("meta"):
            return keys.entries(self.model(config), self.table, layout)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Of the native parameters."""
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in self.model(config).named_parameters()}

    def flavor(self, config: Any) -> str:
        """The name of a config; empty if it has none."""
        return next((name for name, known in self.flavors.items() if known == config), "")

    def parse(self, values: Mapping[str, Any]) -> Any:
        """The config whose fields are `values`; ValueError or TypeError if they are not those of a config."""
        return self.config(**values)

    def fields(self, config: Any) -> dict[str, Any]:
        """The config as JSON takes it."""
        return asdict(config)


def _flavors(family: str) -> dict[str, Any]:
    return {name: config for name, config in registry.FLAVORS.items() if config.family == family}


FLUX1 = Family(
    name="flux1",
    title="FLUX.1 transformer",
    component="transformer",
    config=Flux1Config,
    model=Flux1Model,
    table=keys.FLUX1,
    flavors=_flavors("flux1"),
    diffusers=diffusers_config.FLUX1,
    infer=partial(infer.flux1, flavors=_flavors("flux1")),
    prefixes=("model.diffusion_model.", "diffusion_model."),
)
FLUX1_AE = Family(
    name="flux1-ae",
    title="FLUX.1 autoencoder",
    component="vae",
    config=AutoEncoderConfig,
    model=AutoEncoder,
    table=keys.FLUX1_AE,
    flavors={"flux1-ae": AutoEncoderConfig()},
    diffusers=diffusers_config.FLUX1_AE,
    infer=lambda shapes: None,
    prefixes=("vae.", "first_stage_model."),
)
FAMILIES = (FLUX1, FLUX1_AE)


def config_of(values: Mapping[str, Any]) -> Any:
    """The config that a JSON object describes: its fields, or those of diffusers' config.json.

    Raises:
        ValueError: it describes none.
    """
    for family in FAMILIES:
        try:
            if "_class_name" in values:
                if values["_class_name"] == family.diffusers.class_name:
                    return family.diffusers.read(values)
            elif set(values) <= set(family.config.__dataclass_fields__):  # type: ignore[attr-defined]
                return family.parse(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no config of a {family.title}: {error}") from error
    raise ValueError(f"it has the fields {', '.join(values)}, which are those of no model")


def flavor_named(name: str) -> Any:
    """The config of the flavor `name`; ValueError if there is none, naming those there are."""
    flavors = {name: config for family in FAMILIES for name, config in family.flavors.items()}
    if name not in flavors:
        raise ValueError(f"there is no flavor {name!r}; there are {', '.join(flavors)}")
    return flavors[name]


def family_of(config: Any) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES if isinstance(config, family.config))  # type: ignore[arg-type]
