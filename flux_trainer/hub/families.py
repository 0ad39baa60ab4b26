"""The models whose weights can be read and written, one line each: what a format needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from flux_trainer.hub import diffusers_config, infer
from flux_trainer.hub.detect import Component
from flux_trainer.hub.plain import OF_AUTOENCODERS, OF_TRANSFORMERS
from flux_trainer.models import keys, registry
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config
from flux_trainer.models.configs import Flux1Config, Flux2Config
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.flux2 import Flux2Model

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """A kind of model."""

    name: str
    title: str
    component: Component
    config: type[Any]
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
    in_torchtitan: bool = False
    counters: tuple[str, ...] = ()
    """Whole numbers without meaning for the model, called the same in all layouts: files may lack them."""

    def entries(self, config: Any, layout: keys.Layout) -> dict[str, keys.Entry]:
        """Every tensor of the model that `config` describes, in `layout`."""
        with torch.device("meta"):
            return keys.entries(self.model(config), self.table, layout)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Of the native tensors."""
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in self.model(config).state_dict().items()}

    @property
    def fields_known(self) -> list[str]:
        """Of a config, in their order."""
        return [field.name for field in fields(self.config)]

    def flavor(self, config: Any) -> str:
        """The name of a config; empty if it has none."""
        named = (*registry.FLAVORS.items(), *self.flavors.items())
        return next((name for name, known in named if known == config), "")

    def claims(self, values: Mapping[str, Any]) -> bool:
        """Whether a JSON object speaks of this family: it has fields of its configs, or diffusers' class."""
        if "_class_name" in values:
            return bool(values["_class_name"] == self.diffusers.class_name)
        return set(values) <= set(self.fields_known)

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
    prefixes=OF_TRANSFORMERS,
    in_torchtitan=True,
)
FLUX2 = Family(
    name="flux2",
    title="FLUX.2 transformer",
    component="transformer",
    config=Flux2Config,
    model=Flux2Model,
    table=keys.FLUX2,
    flavors=_flavors("flux2"),
    diffusers=diffusers_config.FLUX2,
    infer=partial(infer.flux2, flavors=_flavors("flux2")),
    prefixes=OF_TRANSFORMERS,
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
    prefixes=OF_AUTOENCODERS,
)
FLUX2_AE = Family(
    name="flux2-ae",
    title="FLUX.2 autoencoder",
    component="vae",
    config=AutoEncoder2Config,
    model=AutoEncoder2,
    table=keys.FLUX2_AE,
    flavors={"flux2-ae": AutoEncoder2Config()},
    diffusers=diffusers_config.FLUX2_AE,
    infer=lambda shapes: None,
    prefixes=OF_AUTOENCODERS,
    counters=("bn.num_batches_tracked",),
)
FAMILIES = (FLUX1, FLUX2, FLUX1_AE, FLUX2_AE)


def config_of(values: Mapping[str, Any], likely: Family | None = None) -> Any:
    """The config that a JSON object describes: its fields, or those of diffusers' config.json.

    Some of the fields are enough if the others have defaults. Where they are those of several families, it is
    of the `likely` one, else of the one that has just these.

    Raises:
        ValueError: it describes none.
    """
    for family in sorted(FAMILIES, key=lambda f: (f is not likely, set(values) != set(f.fields_known))):
        if not family.claims(values):
            continue
        try:
            return family.diffusers.read(values) if "_class_name" in values else family.parse(values)
        except (LookupError, TypeError, ArithmeticError) as error:
            raise ValueError(f"it is no config of a {family.title}: {error!r}") from error
    raise ValueError(f"it has the fields {', '.join(values)}, which are those of no model")


def flavor_named(name: str) -> Any:
    """The config of the flavor `name`; ValueError if there is none, naming those there are."""
    flavors = {name: config for family in FAMILIES for name, config in family.flavors.items()}
    if name not in flavors:
        raise ValueError(f"there is no flavor {name!r}; there are {', '.join(flavors)}")
    return flavors[name]


def family_of(config: Any) -> Family:
    """The family that a config belongs to."""
    return next(family for family in FAMILIES if isinstance(config, family.config))
