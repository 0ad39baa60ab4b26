"""Conversion: byte-equal round trips through every format, models that diffusers opens, and refusals."""

import dataclasses
import json
import zlib
from functools import partial

import pytest
import torch
from helpers import golden, weights_files
from helpers.marks import slow
from helpers.weights_files import SMALL_AE, SMALL_AE2, go, random_file, same_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_trainer.checkpoint.load import verify as verify_checkpoint
from flux_trainer.hub import convert as convert_module
from flux_trainer.hub import write
from flux_trainer.hub.contents import read_header
from flux_trainer.hub.convert import convert
from flux_trainer.hub.families import family_of
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder2 import AutoEncoder2Config
from flux_trainer.models.configs import Flux2Config
from flux_trainer.models.registry import FLAVORS

GOLDEN = weights_files.GOLDEN
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NARROW = {
    "flux1": {"vec_in_dim": 4, "context_in_dim": 4, "hidden_size": 8, "num_heads": 1, "axes_dim": (2, 2, 4)},
    "flux2": {"context_in_dim": 4, "hidden_size": 8, "num_heads": 1, "axes_dim": (2, 2, 2, 2)},
}


@pytest.mark.parametrize(
    ("flavor", "dtype"),
    [
        ("flux2-klein-4b", "fp16"),
        ("flux-debug", "fp32"),
        ("flux-tiny", "bf16"),
        ("flux2-debug", "fp32"),
        ("flux2-tiny", "bf16"),
        ("flux2-ae", "bf16"),
        *slow(
            ("flux-dev", "bf16"), ("flux-schnell", "fp16"), ("flux2-dev", "bf16"), ("flux2-klein-9b", "fp32")
        ),
    ],
)
def test_every_tensor_of_every_flavor_comes_back(flavor, dtype, tmp_path):
    """Real names and depths, narrow tensors."""
    config = AutoEncoder2Config(ch=32, z_channels=2)
    if flavor in FLAVORS:
        config = dataclasses.replace(FLAVORS[flavor], **NARROW[FLAVORS[flavor].family])
    source = random_file(config, tmp_path / "a.safetensors", DTYPES[dtype])
    go(source, tmp_path / "b", "diffusers", config=config)
    go(tmp_path / "b", tmp_path / "c", "dcp", config=config)
    go(tmp_path / "c", tmp_path / "d.safetensors", "bfl")
    assert same_files(source, tmp_path / "d.safetensors")
    if names := golden.key_maps().get(flavor.replace("flux-", "flux1-")):
        assert load_file(source).keys() == names["native"].keys()
        with safe_open(next((tmp_path / "b").glob("*.safetensors")), "pt") as file:
            assert set(file.keys()) == names["diffusers"].keys()


SCHNELL = dataclasses.replace(weights_files.CONFIG, guidance_embed=False)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        *((SCHNELL, dtype) for dtype in DTYPES),
        *((config, "bf16") for config in (weights_files.CONFIG2, SMALL_AE, SMALL_AE2)),
    ],
    ids=lambda x: x if isinstance(x, str) else family_of(x).name,
)
def test_every_pair_of_formats(config, dtype, tmp_path):
    source = random_file(config, tmp_path / "a.safetensors", DTYPES[dtype])
    formats = {"bfl": "a.safetensors", "diffusers": "diffusers", "dcp": "dcp"}
    if config is SCHNELL:
        formats["torchtitan"] = "titan"
    for to in list(formats)[1:]:
        go(source, tmp_path / formats[to], to, config=config)
    for first, place in formats.items():
        for second in formats:
            suffix = ".safetensors" if second == "bfl" else ""
            middle = go(tmp_path / place, tmp_path / f"{first}-{second}{suffix}", second, config=config)
            back = go(middle, tmp_path / f"{first}-{second}-back.safetensors", "bfl", config=config)
            assert same_files(source, back), (first, second)


@pytest.mark.parametrize("family", weights_files.CONFIGS)
def test_diffusers_own_conversion_gives_the_same_bytes(family, tmp_path):
    folder, config = GOLDEN / f"{family}_eps", weights_files.CONFIGS[family]
    target = go(weights_files.bfl(tmp_path, family), tmp_path / "out", "diffusers", config=config)
    written = target / "diffusion_pytorch_model.safetensors"
    assert same_files(folder / "weights_diffusers.safetensors", written)
    back = go(weights_files.diffusers(tmp_path, family), tmp_path / "back.safetensors", "bfl")
    assert same_files(folder / "weights_bfl.safetensors", back)


def opened(target, config):
    """What diffusers and this project make of a folder in diffusers' layout."""
    import diffusers

    name = json.loads((target / "config.json").read_text())["_class_name"]
    theirs, info = getattr(diffusers, name).from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    ours = family_of(config).model(config)
    load_weights(target, {n: p.detach() for n, p in ours.named_parameters()}, config=config)
    return theirs, ours


@pytest.mark.parametrize("shard", [10**9, 200_000])
@torch.no_grad()
def test_diffusers_opens_it_and_computes_the_same(shard, tmp_path, monkeypatch):
    folder = GOLDEN / "flux1_A"
    config = family_of(weights_files.CONFIG).config(**json.loads((folder / "config.json").read_text())["bfl"])
    target = go(folder / "weights_bfl.safetensors", tmp_path / "out", "diffusers", config=config, shard=shard)
    assert (target / "diffusion_pytorch_model.safetensors.index.json").exists() == (shard < 10**6)
    theirs, ours = opened(target, config)
    io = load_file(folder / "io.safetensors")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    given = {name: io[f"in.{name}"] for name in names}
    out = theirs(
        hidden_states=io["in.img"],
        encoder_hidden_states=io["in.txt"],
        pooled_projections=io["in.y"],
        timestep=io["in.timesteps"],
        img_ids=io["in.img_ids"][0],
        txt_ids=io["in.txt_ids"][0],
        guidance=io["in.guidance"],
    ).sample
    golden.use_frequencies(monkeypatch, golden.float32_frequencies())
    assert (out - ours(**given)).abs().max() < 1e-5
    golden.use_frequencies(monkeypatch, golden.recorded_frequencies())
    torch.testing.assert_close(ours(**given), io["out"], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("guided", [True, False])
@torch.no_grad()
def test_diffusers_opens_flux2_and_computes_the_same(guided, tmp_path, monkeypatch):
    """dev's kind, and klein's."""
    folder = GOLDEN / "flux2_C"
    config = Flux2Config(**json.loads((folder / "config.json").read_text())["bfl"])
    config = dataclasses.replace(config, use_guidance_embed=guided)
    weights = load_file(folder / "weights_bfl.safetensors")
    save_file({n: x for n, x in weights.items() if guided or "guidance" not in n}, tmp_path / "a.safetensors")
    target = go(tmp_path / "a.safetensors", tmp_path / "out", "diffusers", config=config)
    theirs, ours = opened(target, config)
    io = load_file(folder / "io.safetensors")
    given = {name: io[f"in.{name}"] for name in ("img", "img_ids", "timesteps", "txt", "txt_ids", "guidance")}
    mine = partial(
        ours,
        x=given["img"],
        x_ids=given["img_ids"],
        timesteps=given["timesteps"],
        ctx=given["txt"],
        ctx_ids=given["txt_ids"],
        guidance=given["guidance"] if guided else None,
    )
    out = theirs(
        hidden_states=given["img"],
        encoder_hidden_states=given["txt"],
        timestep=given["timesteps"],
        img_ids=given["img_ids"],
        txt_ids=given["txt_ids"],
        guidance=given["guidance"] if guided else None,
    ).sample
    golden.use_frequencies(monkeypatch, golden.float32_frequencies())
    assert (out - mine()).abs().max() < 1e-5
    if guided:
        golden.use_frequencies(monkeypatch, golden.recorded_frequencies())
        torch.testing.assert_close(mine(), io["out"], atol=2e-5, rtol=1e-5)


def test_the_checkpoint_it_writes_starts_a_run(tmp_path):
    target = go(weights_files.diffusers(tmp_path), tmp_path / "step-0", "dcp", torch.bfloat16)
    verify_checkpoint(target)
    got = {name: torch.empty(x.shape) for name, x in weights_files.native().items()}
    load_weights(target, got, config=weights_files.CONFIG)
    assert all(torch.equal(got[name], x.bfloat16().float()) for name, x in weights_files.native().items())
    assert open_weights(target).config == weights_files.CONFIG  # it says which model it is


def test_the_average(tmp_path):
    weights = open_weights(weights_files.own(tmp_path), config=weights_files.CONFIG, ema=True, ahead=True)
    convert(weights, tmp_path / "ema.safetensors", "bfl")
    got = load_file(tmp_path / "ema.safetensors")
    assert all(torch.equal(got[name], -x) for name, x in weights_files.native().items())


def test_casting_and_what_a_dtype_cannot_hold(tmp_path):
    weights = weights_files.native()
    weights["single_blocks.1.linear2.weight"][3, 2] = 7e4
    weights["img_in.weight"][0, 0] = float("inf")  # no overflow: it was so
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"single_transformer_blocks\.1\.proj_out\.weight has values up to 7e\+04"
    ):
        go(tmp_path / "a.safetensors", tmp_path / "b", "diffusers", torch.float16, weights_files.CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]
    go(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfl", torch.bfloat16, weights_files.CONFIG)
    got = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(got[name], x.bfloat16()) for name, x in weights.items())


def test_tensors_of_several_dtypes_keep_theirs(tmp_path):
    weights = weights_files.native()
    weights["img_in.bias"] = weights["img_in.bias"].bfloat16()
    save_file(weights, tmp_path / "a.safetensors")
    go(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "bfl", config=weights_files.CONFIG)
    assert same_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_file_says_which_model_it_holds(tmp_path):
    go(weights_files.diffusers(tmp_path), tmp_path / "a.safetensors", "bfl")
    weights = open_weights(tmp_path / "a.safetensors")
    assert weights.config == weights_files.CONFIG
    with pytest.raises(
        ValueError, match=r"does not say which.*--config FILE\.json with the fields in_channels"
    ):
        open_weights(weights_files.bfl(tmp_path))


def test_published_shapes_tell_the_model():
    for config in FLAVORS.values():
        family = family_of(config)
        assert family.infer(family.shapes(config)) == config
    for dev, tiny in (("flux-dev", "flux-tiny"), ("flux2-dev", "flux2-tiny")):
        family = family_of(FLAVORS[dev])
        for depth in (0, 3):
            other = dataclasses.replace(FLAVORS[dev], depth=depth, depth_single_blocks=3, in_channels=384)
            assert family.infer(family.shapes(other)) == other
        unknown = dataclasses.replace(FLAVORS[tiny], depth=2)
        assert family.infer(family.shapes(unknown)) is None


def test_refusals(tmp_path):
    source = weights_files.bfl(tmp_path)
    config = weights_files.CONFIG
    with pytest.raises(ValueError, match="no guidance embedding, so 4 tensors"):
        go(source, tmp_path / "x", "torchtitan", config=config)
    with pytest.raises(ValueError, match=r"torchtitan has no FLUX\.2 transformer"):
        go(weights_files.diffusers(tmp_path, "flux2"), tmp_path / "x", "torchtitan")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        go(source, tmp_path / "x", "bfl", config=config)
    with pytest.raises(ValueError, match=r"is a folder; its name cannot end in \.sft"):
        go(source, tmp_path / "x.sft", "diffusers", config=config)
    with pytest.raises(ValueError, match="is a folder"):
        go(source, tmp_path / "x.safetensors", "diffusers", config=config)
    odd = dataclasses.replace(config, mlp_ratio=2.0)
    other = random_file(odd, tmp_path / "odd.safetensors", torch.float32)
    with pytest.raises(ValueError, match=r"cannot hold a model with mlp_ratio = 2\.0"):
        go(other, tmp_path / "x", "diffusers", config=odd)
    target = go(source, tmp_path / "out", "diffusers", config=config)
    with pytest.raises(ValueError, match="exists already"):
        go(source, target, "diffusers", config=config)
    go(source, target, "dcp", config=config, overwrite=True)
    assert not (target / "config.json").exists()
    (target / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"holds more than weights .*\(thesis\.txt\)"):
        go(source, target, "diffusers", config=config, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_noticed_before_and_leaves_nothing(tmp_path, monkeypatch):
    source = weights_files.bfl(tmp_path)

    def full(folder, needed):
        raise OSError(28, "no room")

    monkeypatch.setattr(convert_module, "ensure_space", full)
    with pytest.raises(OSError, match="no room"):
        go(source, tmp_path / "out", "diffusers", config=weights_files.CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("supported", [True, False])
def test_with_and_without_the_kernels_copying(supported, tmp_path, monkeypatch):
    if not supported:
        monkeypatch.delattr("os.copy_file_range", raising=False)
    target = go(weights_files.diffusers(tmp_path), tmp_path / "a.safetensors", "bfl")
    assert same_files(weights_files.EPS / "weights_bfl.safetensors", target)
    header = read_header(target)
    assert header.metadata[write.CHECKSUM] == f"{zlib.crc32(target.read_bytes()[header.start :]):08x}"
