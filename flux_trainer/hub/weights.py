"""Weights of one model, opened: which model it is, in whose names, and that every tensor is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flux_trainer.checkpoint.commit import STATE
from flux_trainer.checkpoint.load import NOT_MODEL
from flux_trainer.hub.account import account
from flux_trainer.hub.contents import NOTE
from flux_trainer.hub.dcp import DcpFolder
from flux_trainer.hub.detect import Component, Place, belongs, config_beside, locate
from flux_trainer.hub.errors import WeightsError, grouped
from flux_trainer.hub.families import FAMILIES, Family, config_of, family_of
from flux_trainer.hub.plain import OF_A_PIPELINE, plain_contents
from flux_trainer.hub.safetensors_files import SafetensorsFiles
from flux_trainer.hub.source import Completed, Extent, Source
from flux_trainer.models import keys

EMA = "ema."

_OF_A_RUN = ("optimizer", "lr_scheduler", "dataloader", "train_state")
"""What torchtitan's checkpoints hold next to a model's parameters."""

_LIKE = 0.2  # a file whose modules have less than this in common with a model's is of something else


@dataclass(frozen=True)
class Weights:
    """All parameters of one model on disk, by native name."""

    place: Place
    family: Family
    config: Any
    layout: keys.Layout
    prefix: str
    """What comes before each name in the file."""
    entries: keys.Entries
    source: Source
    names: Mapping[str, str]
    """The layout's name of a tensor -> the file's."""

    def read(self, native: str, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """A box of a native tensor, as (first row in the box, rows); it may share memory with the file.

        A scalar comes as a row of one element.
        """
        start, count = (offsets[0], sizes[0]) if sizes else (0, 1)
        entry = self.entries[native]
        for run in entry.within(start, start + count):
            there = (run.start, *offsets[1:])[: entry.ndim]
            size = (run.length, *sizes[1:])[: entry.ndim]
            values = self.source.read(self.names[run.name], there, size)
            yield run.native - start, values.reshape(run.length, *sizes[1:])

    def rows(self, native: str, start: int, count: int) -> Iterator[tuple[Tensor, Extent | None]]:
        """`count` whole rows of a native tensor in order: each part, and where its bytes lie in a file."""
        entry = self.entries[native]
        for run in entry.within(start, start + count):
            name = self.names[run.name]
            there = (run.start, *(0 for _ in entry.shape[1:]))[: entry.ndim]
            values = self.source.read(name, there, (run.length, *entry.shape[1:])[: entry.ndim])
            yield values, self.source.extent(name, run.start)

    def describe(self) -> str:
        """In words: the model, its layout and its dtypes."""
        files = [file for name, file in self.names.items() if name not in self.family.counters]
        dtypes = {str(self.source.tensors[file].dtype)[6:] for file in files}
        kind = {"bfl": "Black Forest Labs' layout", "diffusers": "diffusers' layout"}.get(
            self.layout, "torchtitan's names"
        )
        if self.prefix:
            kind = "ComfyUI's names"
        if self.place.kind != "safetensors":
            kind = "a checkpoint of this trainer" if self.place.kind == "checkpoint" else f"DCP, {kind}"
        flavor = self.family.flavor(self.config)
        return (
            f"{self.family.title}{f' ({flavor})' if flavor else ''} in {kind}, {' and '.join(sorted(dtypes))}"
        )


def open_weights(
    path: str | Path | Place,
    component: Component = "transformer",
    config: Any | None = None,
    *,
    ema: bool = False,
    ahead: bool = False,
    origin: str = "the model",
) -> Weights:
    """Open the weights at `path` and check names and shapes; no values are read.

    Args:
        path: see `detect.locate`.
        config: which model it must be; found out if None.
        ema: take the moving average that a checkpoint of this trainer holds.
        ahead: all values will be read, tensor by tensor; see `DcpFolder`.
        origin: what `config` is, for messages.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it is no whole set of weights of a model that is known, or of another one than `config`.
        CheckpointError: a checkpoint's table of contents cannot be trusted.
    """
    place = path if isinstance(path, Place) else locate(path, component)
    source = open_source(place, component, ema=ema, ahead=ahead)
    if ema and not source.tensors:
        raise WeightsError(f"{place.path} has no moving average of the weights.")
    candidates = (family_of(config),) if config is not None else FAMILIES
    family, layout, prefix = recognise(place, source, component, candidates)
    alike = [other for other in FAMILIES if other.component == family.component]
    if (other := recognise(place, source, component, alike)[0]) is not family:
        raise WeightsError(f"{place.path} holds a {other.title}, but {origin} is a {family.title}.")
    names = _own_names(place, source, family, prefix)
    if absent := [name for name in family.counters if name not in names]:
        source, names = Completed(source, absent), {**names, **{name: name for name in absent}}
    if config is None:
        config, origin = _find_config(place, source, family, layout, names)
    entries = family.entries(config, layout)
    account(place.path, {n: source.tensors[f].shape for n, f in names.items()}, keys.shapes(entries), origin)
    odd = [
        name
        for name, file in names.items()
        if name not in family.counters and not source.tensors[file].dtype.is_floating_point
    ]
    if odd:
        raise WeightsError(
            f"{place.path} holds whole numbers in {', '.join(grouped(odd))}: quantised weights, which other "
            "programs turn into the model's. Fetch the file they were made from."
        )
    return Weights(place, family, config, layout, prefix, entries, source, names)


def open_source(place: Place, component: Component, *, ema: bool = False, ahead: bool = False) -> Source:
    """The tensors at a place that may be a model's; arguments and errors as of `open_weights`."""
    if place.kind == "safetensors":
        if ema:
            raise WeightsError(f"{place.path} has no moving average beside its weights.")
        return SafetensorsFiles(plain_contents(place, component))
    folder = DcpFolder(place.path, EMA if ema else "", ahead)
    companions = NOT_MODEL if place.kind == "checkpoint" else _OF_A_RUN
    if not ema:
        folder.tensors = {n: t for n, t in folder.tensors.items() if not n.startswith(companions)}
    return folder


def recognise(
    place: Place, source: Source, component: Component, families: Sequence[Family] = FAMILIES
) -> tuple[Family, keys.Layout, str]:
    """Family, layout and prefix whose module names are most like those of `source`."""
    scores: dict[tuple[str, keys.Layout, str], float] = {}
    for family in families:
        for prefix in ("", *family.prefixes):
            rest = (name.removeprefix(prefix) for name in source.tensors if name.startswith(prefix))
            found = {keys.pattern(name.rpartition(".")[0]) for name in rest}
            layouts: tuple[keys.Layout, ...] = ("bfl",) if prefix else ("bfl", "diffusers")
            for layout in layouts:
                known = keys.modules(family.table, layout)
                share = len(found & known) / max(1, len(found | known))
                scores[family.name, layout, prefix] = share + (family.component == component) * 1e-3
    best = max(scores, key=lambda key: scores[key])
    if scores[best] < _LIKE:
        some = ", ".join(list(source.tensors)[:4])
        known_titles = " or ".join(family.title for family in families)
        raise WeightsError(
            f"{place.path} does not look like a {known_titles}: it holds {some or 'nothing'}, ..."
        )
    name, layout, prefix = best
    if layout == "bfl" and any(keys.native_leaf(n) != n for n in source.tensors):
        layout = "torchtitan"
    return next(family for family in families if family.name == name), layout, prefix


def _own_names(place: Place, source: Source, family: Family, prefix: str) -> dict[str, str]:
    """The layout's name -> the file's, of all tensors but those of a pipeline's other parts."""
    companions = tuple(set(OF_A_PIPELINE) - set(family.prefixes))
    names: dict[str, str] = {}
    for file in source.tensors:
        if file.startswith(prefix) or not file.startswith(companions):
            name = file.removeprefix(prefix)
            if name in names:
                raise WeightsError(f"{place.path} holds {name} twice: as {names[name]} and as {file}.")
            names[name] = file
    return names


def stated_config(place: Place, source: Source, family: Family) -> tuple[Any, str] | None:
    """The config that the writer of weights left in or beside them, and where; None if there is none.

    Raises:
        WeightsError: it is no config of `family`.
    """
    where = f"the config in {STATE}" if place.kind == "checkpoint" else "the config in its header"
    try:
        if (note := _note_in(place, source)) is not None:
            if note["family"] != family.name:
                raise ValueError(f"family {note['family']}")
            return family.parse(note["config"]), where
        if (beside := config_beside(place)) is not None:
            file, values = beside
            where = str(file)
            if not (belongs(file, place) or family.claims(values)):
                return None
            config = config_of(values, family)
            if family_of(config) is not family:
                raise ValueError(f"it describes a {family_of(config).title}")
            return config, f"the config in {file.name}"
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{place.path} holds a {family.title}, but {where} cannot be used: {error}."
        ) from error
    return None


def _note_in(place: Place, source: Source) -> Any | None:
    """The `note` of a checkpoint or of a safetensors file; None if it has none."""
    if place.kind != "checkpoint":
        return json.loads(source.metadata[NOTE]) if NOTE in source.metadata else None
    state = json.loads((place.path / STATE).read_bytes())
    if not isinstance(state, dict):
        raise ValueError("it holds no object")
    return state.get("model")


def _find_config(
    place: Place, source: Source, family: Family, layout: keys.Layout, names: Mapping[str, str]
) -> tuple[Any, str]:
    """The config of the model in a file, and in words where it comes from."""
    found = {name: source.tensors[file].shape for name, file in names.items()}
    if stated := stated_config(place, source, family):
        return stated
    for config in family.flavors.values():
        if keys.shapes(family.entries(config, layout)) == found:
            return config, "its flavor"
    if layout != "diffusers" and (config := family.infer({keys.native_leaf(n): s for n, s in found.items()})):
        return config, "the config that its shapes tell"
    raise WeightsError(
        f"{place.path} holds a {family.title}, but does not say which: its shapes are those of no flavor "
        f"({', '.join(family.flavors)}). Say it: --config FILE.json with the fields "
        f"{', '.join(family.fields_known)}."
    )


def note(config: Any) -> dict[str, Any]:
    """What files of this trainer say of the model whose config it is."""
    family = family_of(config)
    return {"family": family.name, "config": family.fields(config)}
