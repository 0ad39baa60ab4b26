"""Names in other layouts, against maps read back from diffusers' own conversion scripts."""

import pytest
import torch
from helpers import golden
from torch import nn

from flux_trainer.models import keys
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.flux2 import Flux2Model
from flux_trainer.models.registry import FLAVORS

MAPS = golden.key_maps()
MODELS = {
    "flux1-dev": (lambda: Flux1Model(FLAVORS["flux-dev"]), keys.FLUX1),
    "flux1-schnell": (lambda: Flux1Model(FLAVORS["flux-schnell"]), keys.FLUX1),
    "flux1-ae": (lambda: AutoEncoder(AutoEncoderConfig()), keys.FLUX1_AE),
    "flux2-dev": (lambda: Flux2Model(FLAVORS["flux2-dev"]), keys.FLUX2),
    "flux2-klein-4b": (lambda: Flux2Model(FLAVORS["flux2-klein-4b"]), keys.FLUX2),
    "flux2-klein-9b": (lambda: Flux2Model(FLAVORS["flux2-klein-9b"]), keys.FLUX2),
    "flux2-ae": (lambda: AutoEncoder2(AutoEncoder2Config()), keys.FLUX2_AE),
}


def made(name: str, layout: keys.Layout) -> dict[str, keys.Entry]:
    model, table = MODELS[name]
    with torch.device("meta"):
        return keys.entries(model(), table, layout)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_lies_where_the_conversion_scripts_put_it(name):
    entries, reference = made(name, "diffusers"), MAPS[name]
    assert {native: list(entry.shape) for native, entry in entries.items()} == reference["native"]
    want_shapes = {there: record["shape"] for there, record in reference["diffusers"].items()}
    assert {there: list(shape) for there, shape in keys.shapes(entries).items()} == want_shapes
    want = {}
    for there, record in reference["diffusers"].items():
        rows = record["shape"][0] if record["shape"] else 1
        parts = [record.get("rows", [0, rows])]
        if record.get("op") == "swap_halves_dim0":
            parts = [[rows // 2, rows], [0, rows // 2]]
        want[there] = [(record.get("bfl", there), *part) for part in parts]
    found = keys.sources(entries)
    assert {
        there: [(native, run.native, run.native + run.length) for native, run in parts]
        for there, parts in found.items()
    } == want


@pytest.mark.parametrize("name", MODELS)
def test_the_runs_of_a_tensor_cover_its_rows_once(name):
    for native, entry in made(name, "diffusers").items():
        end = 0
        for run in entry.runs:
            assert run.native == end, native
            end += run.length
        assert end == (entry.shape[0] if entry.shape else 1), native


def test_other_native_layouts():
    assert all(run.name == native for native, e in made("flux1-dev", "bfl").items() for run in e.runs)
    for native, entry in made("flux1-dev", "torchtitan").items():
        (run,) = entry.runs
        assert run.name == native.replace(".scale", ".weight")
        assert keys.native_leaf(run.name) == native


def test_rows_within_a_span():
    entry = made("flux1-schnell", "diffusers")["final_layer.adaLN_modulation.1.bias"]  # halves of 3072
    (first, second) = entry.within(3000, 3100)
    assert first == keys.Run("norm_out.linear.bias", 6072, 3000, 72)
    assert second == keys.Run("norm_out.linear.bias", 0, 3072, 28)
    assert list(entry.within(5, 5)) == []


def test_a_parameter_without_an_entry_is_noticed():
    model = nn.Module()
    model.extra = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match="no table entry for extra"):
        keys.entries(model, keys.FLUX1, "diffusers")
