"""Conversion: byte-equal round trips through every format, models that diffusers opens, and refusals."""

import dataclasses
import gzip
import json
import zlib
from pathlib import Path

import pytest
import torch
from helpers import weights_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_trainer.checkpoint.load import verify as verify_checkpoint
from flux_trainer.hub import convert as convert_module
from flux_trainer.hub import write
from flux_trainer.hub.autoencoder import load_autoencoder
from flux_trainer.hub.convert import convert
from flux_trainer.hub.families import family_of
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.safetensors_files import read_header
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.registry import FLAVORS

GOLDEN = weights_files.GOLDEN
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NARROW = {"vec_in_dim": 4, "context_in_dim": 4, "hidden_size": 8, "num_heads": 1, "axes_dim": (2, 2, 4)}


def go(source, target, to, dtype=None, config=None, **options):
    convert(open_weights(source, config=config, ahead=True), target, to, dtype, **options)
    return target


def same_files(left: Path, right: Path) -> bool:
    """Whether two safetensors files hold the same bytes under the same names."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a
    )


def random_file(config, path: Path, dtype) -> Path:
    """A BFL file of a model with random weights, written by the safetensors library."""
    generator = torch.Generator().manual_seed(0)
    shapes = family_of(config).shapes(config)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(weights, path)
    return path


@pytest.mark.parametrize(
    ("flavor", "dtype"),
    [("flux-dev", "bf16"), ("flux-schnell", "fp16"), ("flux-debug", "fp32"), ("flux-tiny", "bf16")],
)
def test_every_tensor_of_every_flavor_comes_back(flavor, dtype, tmp_path):
    """Real names and depths, narrow tensors."""
    config = dataclasses.replace(FLAVORS[flavor], **NARROW)
    source = random_file(config, tmp_path / "a.safetensors", DTYPES[dtype])
    go(source, tmp_path / "b", "diffusers", config=config)
    go(tmp_path / "b", tmp_path / "c", "dcp", config=config)
    go(tmp_path / "c", tmp_path / "d.safetensors", "bfl")
    assert same_files(source, tmp_path / "d.safetensors")
    maps = json.loads(gzip.decompress((GOLDEN / "flux1_key_maps.json.gz").read_bytes()))
    if flavor in ("flux-dev", "flux-schnell"):
        names = maps[flavor.replace("flux", "flux1")]
        assert load_file(source).keys() == names["native"].keys()
        with safe_open(next((tmp_path / "b").glob("*.safetensors")), "pt") as file:
            assert set(file.keys()) == names["diffusers"].keys()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_formats(dtype, tmp_path):
    config = dataclasses.replace(weights_files.CONFIG, guidance_embed=False)
    source = random_file(config, tmp_path / "a.safetensors", DTYPES[dtype])
    formats = {"bfl": "a.safetensors", "diffusers": "diffusers", "dcp": "dcp", "torchtitan": "titan"}
    for to in ("diffusers", "dcp", "torchtitan"):
        go(source, tmp_path / formats[to], to, config=config)
    for first, place in formats.items():
        for second in formats:
            suffix = ".safetensors" if second == "bfl" else ""
            middle = go(tmp_path / place, tmp_path / f"{first}-{second}{suffix}", second, config=config)
            back = go(middle, tmp_path / f"{first}-{second}-back.safetensors", "bfl", config=config)
            assert same_files(source, back), (first, second)


def test_diffusers_own_conversion_gives_the_same_bytes(tmp_path):
    reference = weights_files.EPS / "weights_diffusers.safetensors"
    target = go(weights_files.bfl(tmp_path), tmp_path / "out", "diffusers", config=weights_files.CONFIG)
    assert same_files(reference, target / "diffusion_pytorch_model.safetensors")
    back = go(weights_files.diffusers(tmp_path), tmp_path / "back.safetensors", "bfl")
    assert same_files(weights_files.EPS / "weights_bfl.safetensors", back)


@pytest.mark.parametrize("shard", [10**9, 200_000])
@torch.no_grad()
def test_diffusers_opens_it_and_computes_the_same(shard, tmp_path):
    from diffusers import FluxTransformer2DModel

    folder = GOLDEN / "flux1_A"
    config = family_of(weights_files.CONFIG).config(**json.loads((folder / "config.json").read_text())["bfl"])
    target = go(folder / "weights_bfl.safetensors", tmp_path / "out", "diffusers", config=config, shard=shard)
    assert (target / "diffusion_pytorch_model.safetensors.index.json").exists() == (shard < 10**6)
    theirs, info = FluxTransformer2DModel.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    ours = Flux1Model(config)
    load_weights(target, {n: p.detach() for n, p in ours.named_parameters()}, config=config)
    io = load_file(folder / "io.safetensors")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    mine = ours(**{name: io[f"in.{name}"] for name in names})
    out = theirs(
        hidden_states=io["in.img"],
        encoder_hidden_states=io["in.txt"],
        pooled_projections=io["in.y"],
        timestep=io["in.timesteps"],
        img_ids=io["in.img_ids"][0],
        txt_ids=io["in.txt_ids"][0],
        guidance=io["in.guidance"],
    ).sample
    assert (out - mine).abs().max() < 1e-5
    torch.testing.assert_close(mine, io["out"], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_autoencoder_too(tmp_path):
    from diffusers import AutoencoderKL

    folder = GOLDEN / "flux1_ae"
    config = AutoEncoderConfig(**json.loads((folder / "config.json").read_text())["bfl"])
    target = go(folder / "weights_bfl.safetensors", tmp_path / "out", "diffusers", config=config)
    theirs, info = AutoencoderKL.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.scaling_factor == config.scale_factor
    ours = AutoEncoder(config)
    ours.load_state_dict(load_file(folder / "weights_bfl.safetensors"))
    io = load_file(folder / "io.safetensors")
    mean, _ = ours.moments(io["in.image"])
    assert (theirs.encode(io["in.image"]).latent_dist.mean - mean).abs().max() < 1e-5
    z = io["in.z2"] / config.scale_factor + config.shift_factor
    assert (theirs.decode(z).sample - ours.decode(io["in.z2"])).abs().max() < 1e-5
    back = go(target, tmp_path / "back.safetensors", "bfl")
    assert same_files(folder / "weights_bfl.safetensors", back)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    target.rename(tmp_path / "pipeline" / "vae")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", back):
        loaded = load_autoencoder(place)
        assert loaded.config == config
        assert all(torch.equal(x, ours.state_dict()[name]) for name, x in loaded.state_dict().items())


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
    other = dataclasses.replace(FLAVORS["flux-dev"], depth=3, in_channels=384)
    assert family.infer(family.shapes(other)) == other
    unknown = dataclasses.replace(FLAVORS["flux-tiny"], depth=2)
    assert family.infer(family.shapes(unknown)) is None


def test_refusals(tmp_path):
    source = weights_files.bfl(tmp_path)
    config = weights_files.CONFIG
    with pytest.raises(ValueError, match="no guidance embedding, so 4 tensors"):
        go(source, tmp_path / "x", "torchtitan", config=config)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        go(source, tmp_path / "x", "bfl", config=config)
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
    with pytest.raises(ValueError, match=r"holds more than weights \(thesis\.txt\)"):
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
