"""Starting from any layout: the values, what is read for them, and what is refused."""

import dataclasses

import pytest
import torch
from helpers import weights_files
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flux_trainer.checkpoint.errors import CheckpointError, DamagedError
from flux_trainer.hub import load as load_module
from flux_trainer.hub.families import family_of
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.parallel.fsdp import shard
from flux_trainer.parallel.tensor import tensor_parallel

CONFIG = weights_files.CONFIG
SCHNELL = dataclasses.replace(CONFIG, guidance_embed=False)


def empty(config=CONFIG, dtype=torch.float32):
    model = family_of(config).model(config).to(dtype)
    return {name: p.detach().fill_(float("nan")) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", weights_files.CONFIGS)
@pytest.mark.parametrize("layout", weights_files.ALL)
def test_every_layout_gives_the_same_weights(layout, family, tmp_path):
    path, config = weights_files.ALL[layout](tmp_path, family), weights_files.CONFIGS[family]
    got = empty(config)
    what = load_weights(path, got, config=config)
    assert f"FLUX.{family[-1]} transformer" in what
    for name, x in weights_files.native(family).items():
        assert torch.equal(got[name], x), name
    low = empty(config, dtype=torch.bfloat16)
    load_weights(path, low, config=config)
    for name, x in weights_files.native(family).items():
        assert torch.equal(low[name], x.bfloat16()), name


def test_the_average_on_request(tmp_path):
    path = weights_files.own(tmp_path)
    got = empty()
    assert "average" in load_weights(path, got, config=CONFIG, ema=True)
    for name, x in weights_files.native().items():
        assert torch.equal(got[name], -x), name
    for other in (weights_files.bfl(tmp_path), weights_files.torchtitan(tmp_path)):
        with pytest.raises(CheckpointError, match="has no moving average"):
            load_weights(other, got, config=CONFIG, ema=True)


MESHES = {"fsdp2": (2, 1, 1), "tp2": (1, 2, 1), "pp2": (1, 1, 2)}


def parts(mesh):
    """This rank's parameters on a mesh of (fsdp, tp, pp) ranks, and the layouts."""
    with torch.device("meta"):
        model = Flux1Model(CONFIG)
    ranks = init_device_mesh("cpu", mesh, mesh_dim_names=("fsdp", "tp", "pp"))
    layouts = {}
    if mesh[1] > 1:
        layouts = tensor_parallel(model.blocks(), ranks["tp"].get_group())
    if mesh[0] > 1:
        shard(model, [block for _, block in model.blocks()], ranks["fsdp"])
    named = dict(model.to_empty(device="cpu").named_parameters())
    if mesh[2] > 1:  # the blocks of one kind to each stage
        first = ranks["pp"].get_local_rank() == 0
        named = {n: p for n, p in named.items() if n.startswith(("single", "final")) != first}
    return {n: p.detach() for n, p in named.items()}, layouts


def load_on(path: str, mesh: tuple[int, int, int]) -> tuple[int, int]:
    """Load, compare with the whole weights, and return the bytes read and held."""
    parameters, layouts = parts(mesh)
    opened = []

    def spy(*args, **kwargs):
        opened.append(open_weights(*args, **kwargs))
        return opened[-1]

    load_module.open_weights = spy
    load_weights(path, parameters, torch.distributed.group.WORLD, layouts, config=CONFIG)
    held = 0
    for name, whole in weights_files.native().items():
        if name not in parameters:
            continue
        part = parameters[name]
        if layout := layouts.get(name):
            whole = torch.cat([whole.narrow(layout.dim, *s) for s in layout.sections], layout.dim)
        if isinstance(part, DTensor):
            rank, size = part.device_mesh.get_local_rank(), part.device_mesh.size()
            part = part.to_local()
            chunks = whole.chunk(size)
            whole = chunks[rank] if rank < len(chunks) else whole[:0]
        assert torch.equal(part, whole), name
        held += part.nbytes
    return opened[-1].source.bytes_read, held


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("layout", ["sharded", "torchtitan"])
def test_ranks_read_what_they_hold(mesh, layout, tmp_path):
    path = weights_files.ALL[layout](tmp_path)
    total = sum(x.nbytes for x in weights_files.native().values())
    for read, held in run_ranks(2, load_on, str(path), MESHES[mesh]):
        assert read == held < total


def fails_on_both(path: str) -> str:
    parameters, layouts = parts((2, 1, 1))
    try:
        load_weights(path, parameters, torch.distributed.group.WORLD, layouts, config=CONFIG)
    except CheckpointError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_all_ranks_raise_the_same_sentence(tmp_path):
    weights = weights_files.native()
    del weights["img_in.bias"]
    save_file(weights, tmp_path / "x.safetensors")
    first, second = run_ranks(2, fails_on_both, str(tmp_path / "x.safetensors"))
    assert first == second
    assert "1 missing (img_in.bias)" in first


def test_a_missing_guidance_embedding_is_said_and_nothing_is_filled(tmp_path):
    weights = {n: x for n, x in weights_files.native().items() if "guidance" not in n}
    save_file(weights, tmp_path / "schnell.safetensors")
    got = empty()
    with pytest.raises(ValueError, match=r"has no guidance embedding \(guidance_in.*flux-schnell"):
        load_weights(tmp_path / "schnell.safetensors", got, config=CONFIG)
    assert all(x.isnan().all() for x in got.values())
    with pytest.raises(ValueError, match=r"has a guidance embedding \(guidance_in.*such as flux-dev"):
        load_weights(weights_files.bfl(tmp_path), empty(SCHNELL), config=SCHNELL)


def test_everything_that_differs_is_named(tmp_path):
    weights = weights_files.native()
    weights["double_blocks.0.img_attn.qkvv.weight"] = weights.pop("double_blocks.0.img_attn.qkv.weight")
    weights["single_blocks.0.linear2.bias"] = torch.zeros(3)
    weights["single_blocks.1.linear2.bias"] = torch.zeros(3)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(tmp_path / "x.safetensors", empty(), config=CONFIG)
    for part in (
        "1 missing (double_blocks.0.img_attn.qkv.weight)",
        "1 unknown (double_blocks.0.img_attn.qkvv.weight [nearest: double_blocks.*.img_attn.qkv.weight])",
        "2 misshapen (single_blocks.0-1.linear2.bias [3] instead of [16])",
    ):
        assert part in str(error.value)


def test_another_family_is_refused(tmp_path):
    told = {
        "flux1": r"holds a FLUX\.1 .* but the model is a FLUX\.2",
        "flux2": r"holds a FLUX\.2 .* a FLUX\.1",
    }
    for family, config in (("flux1", weights_files.CONFIG2), ("flux2", CONFIG)):
        with pytest.raises(ValueError, match=told[family]):
            load_weights(weights_files.bfl(tmp_path, family), empty(config), config=config)


def test_quantised_weights_are_refused(tmp_path):
    weights = weights_files.native()
    weights["txt_in.weight"] = weights["txt_in.weight"].to(torch.int8)
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"whole numbers in txt_in\.weight"):
        load_weights(tmp_path / "x.safetensors", empty(), config=CONFIG)


def test_a_damaged_checkpoint_of_ours_is_found(tmp_path):
    path = weights_files.own(tmp_path) / "checkpoint" / "step-10"
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match="content changed"):
        load_weights(path, empty(), config=CONFIG)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nothing.safetensors", None, "There is no file or folder"),
        ("x.ckpt", b"\x80", "is a pickle, which can run any code"),
        ("x.gguf", b"GGUF", "quantised"),
        ("x.safetensors", b"not a safetensors file", "not a readable safetensors file"),
        ("x.safetensors", (5).to_bytes(8, "little") + b"[1,2]", "its header is damaged"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(name, content, told, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told):
        load_weights(tmp_path / name, empty(), config=CONFIG)


def test_other_files(tmp_path):
    path = weights_files.bfl(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"it has \d+ bytes and its header speaks of"):
        load_weights(path, empty(), config=CONFIG)
    save_file({"a.b": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"does not look like a FLUX\.1 transformer: it holds a\.b"):
        load_weights(tmp_path / "y.safetensors", empty(), config=CONFIG)
    folder = weights_files.sharded(tmp_path)
    shard_file = next(folder.glob("*-00002-of-*"))
    tensors = load_file(shard_file)
    save_file({n: x for n, x in tensors.items() if "proj_mlp" not in n}, shard_file)
    with pytest.raises(CheckpointError, match=r"not in the files it names: single_transformer_blocks"):
        load_weights(folder, empty(), config=CONFIG)
    shard_file.unlink()
    with pytest.raises(
        CheckpointError, match="names files that are not beside it: diffusion_pytorch_model-00002"
    ):
        load_weights(folder, empty(), config=CONFIG)
    titan = weights_files.torchtitan(tmp_path) / "step-5"
    file = next(titan.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cut off"):
        load_weights(titan, empty(), config=CONFIG)
