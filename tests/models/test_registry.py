"""Flavors against the published models' parameter lists, and initial weights as data."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from flux_trainer.flow.rng import Purpose, normal_slice, uniform_slice
from flux_trainer.models.flops import num_params
from flux_trainer.models.init import Constant, Normal, Rows, Uniform, initial_values
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import FLAVORS, build

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "flux1_keys.json").read_text())
PUBLISHED = {"flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560}
PUBLISHED2 = {
    "flux2-dev": 32_223_281_152,
    "flux2-klein-4b": 3_875_544_576,
    "flux2-klein-9b": 9_078_581_248,
}


def meta_model(flavor: str) -> FluxModel:
    with torch.device("meta"):
        return build(FLAVORS[flavor].family, flavor)


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_names_and_shapes_of_the_published_models(flavor):
    expected = {}
    for entry in KEYS[flavor]:
        for block in range(entry.get("blocks", 1)):
            expected[entry["name"].replace("*", str(block))] = tuple(entry["shape"])
    model = meta_model(flavor)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    assert sum(math.prod(shape) for shape in expected.values()) == PUBLISHED[flavor]
    assert num_params(FLAVORS[flavor]) == PUBLISHED[flavor]


@pytest.mark.parametrize("flavor", PUBLISHED2)
def test_sizes_of_the_published_flux2_models(flavor):
    config = FLAVORS[flavor]
    assert num_params(config) == PUBLISHED2[flavor]
    assert (config.guidance_embed, config.head_dim) == (flavor == "flux2-dev", 128)


@pytest.mark.parametrize("flavor", ["flux-tiny", "flux2-tiny"])
def test_blocks_in_forward_order(flavor):
    names = [name for name, _ in meta_model(flavor).blocks()]
    assert names == [*(f"double_blocks.{i}" for i in range(3)), *(f"single_blocks.{i}" for i in range(6))]
    model = meta_model("flux-debug")
    assert all(model.get_submodule(name) is block for name, block in model.blocks())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="flux-schnell"):
        build("flux1", "flux-shnell")
    with pytest.raises(ValueError, match="Family flux2 has no flavor 'flux-dev'; there are: flux2-dev, "):
        build("flux2", "flux-dev")
    with pytest.raises(ValueError, match="no model family 'flux9'; there are: flux1, flux2"):
        build("flux9", "flux-dev")


def test_every_parameter_has_a_distribution():
    model = meta_model("flux-dev")
    distributions = model.init_distributions()
    assert list(distributions) == [name for name, _ in model.named_parameters()]
    h, mlp = 3072, 4 * 3072
    square, wide = Uniform(math.sqrt(6 / (2 * h))), Uniform(math.sqrt(6 / (h + mlp)))
    expected = {
        "img_in.weight": Uniform(math.sqrt(6 / (64 + h))),
        "txt_in.bias": Constant(0.0),
        "time_in.in_layer.weight": Normal(0.02),
        "guidance_in.out_layer.weight": Normal(0.02),
        "vector_in.out_layer.weight": Normal(0.02),
        "vector_in.out_layer.bias": Constant(0.0),
        "double_blocks.7.img_mod.lin.weight": Constant(0.0),
        "double_blocks.7.img_mod.lin.bias": Constant(0.0),
        "double_blocks.7.txt_attn.qkv.weight": Rows(((h, square),) * 3),
        "double_blocks.7.txt_attn.qkv.bias": Constant(0.0),
        "double_blocks.7.txt_attn.norm.key_norm.scale": Constant(1.0),
        "double_blocks.7.img_attn.proj.weight": square,
        "double_blocks.7.img_mlp.0.weight": wide,
        "double_blocks.7.img_mlp.2.weight": wide,
        "single_blocks.9.linear1.weight": Rows(((h, square),) * 3 + ((mlp, wide),)),
        "single_blocks.9.linear2.weight": Uniform(math.sqrt(6 / (h + mlp + h))),
        "single_blocks.9.modulation.lin.weight": Constant(0.0),
        "single_blocks.9.norm.query_norm.scale": Constant(1.0),
        "final_layer.linear.weight": Constant(0.0),
        "final_layer.adaLN_modulation.1.weight": Constant(0.0),
    }
    assert {name: distributions[name] for name in expected} == expected


def test_every_parameter_of_flux2_has_a_distribution():
    model = meta_model("flux2-klein-4b")
    distributions = model.init_distributions()
    assert list(distributions) == [name for name, _ in model.named_parameters()]
    h, mlp = 3072, 3 * 3072
    square, wide = Uniform(math.sqrt(6 / (2 * h))), Uniform(math.sqrt(6 / (h + mlp)))
    expected = {
        "txt_in.weight": Uniform(math.sqrt(6 / (7680 + h))),
        "time_in.out_layer.weight": Normal(0.02),
        "double_stream_modulation_img.lin.weight": Constant(0.0),
        "double_stream_modulation_txt.lin.weight": Constant(0.0),
        "single_stream_modulation.lin.weight": Constant(0.0),
        "double_blocks.4.txt_mlp.0.weight": Rows(((mlp, wide),) * 2),
        "double_blocks.4.txt_mlp.2.weight": wide,
        "single_blocks.9.linear1.weight": Rows(((h, square),) * 3 + ((mlp, wide),) * 2),
        "final_layer.linear.weight": Constant(0.0),
    }
    assert {name: distributions[name] for name in expected} == expected


def test_initial_values_by_slices():
    shape = torch.Size((7, 3))
    rows = Rows(((2, Uniform(0.5)), (3, Normal(2.0)), (2, Constant(4.0))))
    whole = initial_values(rows, "a.weight", shape, 3, 0, 21)
    draw = int.from_bytes(hashlib.blake2b(b"a.weight", digest_size=8).digest(), "little") >> 1
    assert torch.equal(whole[:6], uniform_slice(3, Purpose.INIT, draw, 0, 6) * 1.0 - 0.5)
    assert torch.equal(whole[6:15], normal_slice(3, Purpose.INIT, draw, 6, 9) * 2)
    assert torch.equal(whole[15:], torch.full((6,), 4.0))
    for start in range(21):
        for count in range(22 - start):
            part = initial_values(rows, "a.weight", shape, 3, start, count)
            assert torch.equal(part, whole[start : start + count])
    assert not torch.equal(whole[:6], initial_values(rows, "b.weight", shape, 3, 0, 6))
    assert initial_values(rows, "a.weight", shape, 3, 0, 21, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("distribution", "std"), [(Uniform(0.3), 0.3 / math.sqrt(3)), (Normal(0.02), 0.02)])
def test_initial_values_have_their_deviation(distribution, std):
    values = initial_values(distribution, "w", torch.Size((200, 200)), 0, 0, 40_000)
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert abs(values.mean().item()) < 4 * std / 200
