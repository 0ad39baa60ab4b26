"""Files that are nearly weights: each is refused with a sentence, and none is taken for what it is not."""

import json
import pickle
import shutil

import pytest
import torch
from helpers import weights_files
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from flux_trainer.hub import infer
from flux_trainer.hub.autoencoder import load_autoencoder, read_config
from flux_trainer.hub.convert import convert
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.families import FLUX1, FLUX1_AE, config_of
from flux_trainer.hub.verify import verify
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.registry import FLAVORS

AE = weights_files.GOLDEN / "flux1_ae"
AE_CONFIG = AutoEncoderConfig(**json.loads((AE / "config.json").read_text())["bfl"])


def problems(path, config=weights_files.CONFIG):
    return " ".join(problem for report in verify(path, config) for problem in report.problems)


def rewrite(step, change):
    """Change the table of contents of a DCP folder."""
    table = pickle.loads((step / ".metadata").read_bytes())
    change(table)
    (step / ".metadata").write_bytes(pickle.dumps(table))


def forget(table):
    del table.storage_data[MetadataIndex("img_in.weight", torch.Size([0, 0]))]


def cover(chunks):
    """Cut img_in.weight [rows, columns] into `chunks` of its rows, all of which lie somewhere."""

    def change(table):
        entry = table.state_dict_metadata["img_in.weight"]
        place = table.storage_data[MetadataIndex("img_in.weight", torch.Size([0, 0]))]
        rows, columns = entry.size
        entry.chunks = []
        for first, last in chunks(rows):
            offsets = torch.Size([first, 0])
            entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size([last - first, columns])))
            table.storage_data[MetadataIndex("img_in.weight", offsets)] = place

    return change


@pytest.mark.parametrize(
    "change",
    [
        forget,
        cover(
            lambda rows: [(0, rows // 2), (rows // 4, rows // 4 + rows - rows // 2)]
        ),  # overlap, and a hole
        cover(lambda rows: [(0, rows // 2), (rows, rows + rows - rows // 2)]),  # outside
    ],
)
def test_a_table_with_a_hole_is_not_whole(change, tmp_path):
    step = weights_files.torchtitan(tmp_path) / "step-5"
    assert not problems(step)
    rewrite(step, change)
    assert "img_in.weight is incomplete" in problems(step)
    with pytest.raises(WeightsError, match=r"img_in\.weight is incomplete"):
        open_weights(step, config=weights_files.CONFIG)


def test_chunks_that_fit_are_whole(tmp_path):
    step = weights_files.torchtitan(tmp_path) / "step-5"
    rewrite(step, cover(lambda rows: [(rows // 2, rows), (0, rows // 2)]))
    assert not problems(step)


@pytest.mark.parametrize("index", ['{"transformer": ["diffusers", "FluxTransformer2DModel"]}', "[]", "{"])
def test_a_pipeline_that_lacks_what_it_lists(index, tmp_path):
    folder = weights_files.diffusers(tmp_path)
    assert not problems(folder)
    (folder / "transformer").rename(folder / "vae")
    (folder / "model_index.json").write_text(index)
    assert "There is no file or folder" in problems(folder, None) or "no list of a pipeline" in problems(
        folder
    )
    (folder / "vae").rename(folder / "transformer")
    (folder / "model_index.json").write_text('{"transformer": ["a", "b"], "vae": [null, null]}')
    assert not problems(folder)


@pytest.mark.parametrize("content", [b"\xff{}", b"[1]", b'{"model": 3}'])
def test_a_damaged_state_is_found_by_its_hash(content, tmp_path):
    step = weights_files.own(tmp_path) / "checkpoint" / "step-10"
    (step / "state.json").write_bytes(content)
    assert "state.json (" in problems(step)
    assert "the config in state.json cannot be used" in problems(step, None)
    with pytest.raises(WeightsError, match=r"the config in state\.json cannot be used"):
        open_weights(step)


@pytest.mark.parametrize("note", ["hello", "[]", "3", '{"family": "flux1", "config": []}'])
def test_a_note_that_is_none(note, tmp_path):
    save_file(weights_files.native(), tmp_path / "x.safetensors", metadata={"flux_trainer": note})
    assert "the config in its header cannot be used" in problems(tmp_path / "x.safetensors", None)


def test_a_header_without_metadata(tmp_path):
    body = {"__metadata__": None, "a.b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    for dtype, told in (("F32", "does not look like"), (["F32"], "has dtype")):
        body["a.b"]["dtype"] = dtype
        header = json.dumps(body).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        assert told in problems(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"double_blocks.0.img_mlp.2.weight": None, "single_blocks.0.linear2.weight": None},
        {"double_blocks.0.img_attn.norm.query_norm.scale": (0,)},
        {"double_blocks.0.img_attn.norm.query_norm.scale": (128,), "img_in.weight": (200, 64)},
        {"double_blocks.0.img_mlp.2.weight": (3072,)},
        {"img_in.weight": (0, 64)},
    ],
)
def test_shapes_of_no_model(change):
    shapes = FLUX1.shapes(FLAVORS["flux-dev"])
    assert FLUX1.infer(shapes) == FLAVORS["flux-dev"]
    shapes = {name: shape for name, shape in (shapes | change).items() if shape is not None}
    assert FLUX1.infer(shapes) is None


def test_the_mlp_keeps_its_width():
    assert int(22 * (15 / 22)) == 14
    for hidden in (22, 3072):
        for width in range(1, 4 * hidden, 7):
            assert int(hidden * infer.ratio(width, hidden)) == width


@pytest.mark.parametrize(
    ("other", "dtype"), [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float8_e5m2, torch.bfloat16)]
)
def test_float8_beside_other_dtypes(other, dtype, tmp_path):
    folder = weights_files.diffusers(tmp_path) / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    query = "transformer_blocks.0.attn.to_q.weight"
    weights = {n: x.to(torch.float8_e4m3fn if n == query else other) for n, x in load_file(file).items()}
    save_file(weights, file)
    convert(open_weights(folder, ahead=True), tmp_path / "x.safetensors", "bfl")
    got = load_file(tmp_path / "x.safetensors")
    fused = got["double_blocks.0.img_attn.qkv.weight"]
    assert fused.dtype == dtype
    assert torch.equal(fused[: len(weights[query])], weights[query].to(dtype))
    assert got["img_in.weight"].dtype == other


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("img_in.bias", "holds img_in.bias twice: as img_in.bias and as model.diffusion_model.img_in.bias"),
        ("diffusion_model.img_in.bias", "1 unknown (diffusion_model.img_in.bias"),
        ("diffusion_model.strange", "1 unknown (diffusion_model.strange"),
        ("vae.decoder.conv_in.bias", ""),
    ],
)
def test_no_tensor_is_dropped_without_a_word(extra, told, tmp_path):
    weights = {f"model.diffusion_model.{name}": x for name, x in weights_files.native().items()}
    save_file(weights | {extra: torch.ones(16)}, tmp_path / "x.safetensors")
    found = problems(tmp_path / "x.safetensors")
    assert told in found
    assert bool(told) == bool(found)


@pytest.fixture
def vae(tmp_path):
    """diffusers' folder of an autoencoder, as diffusers might have written it: without our note."""
    source = open_weights(AE / "weights_bfl.safetensors", "vae", AE_CONFIG, ahead=True)
    convert(source, tmp_path / "vae", "diffusers")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    return tmp_path / "vae"


@pytest.mark.parametrize(
    "change",
    [
        {"norm_num_groups": 16},
        {"latents_mean": [0.0], "latents_std": [1.0]},
        {"mid_block_add_attention": False},
        {"act_fn": "gelu"},
        {"use_quant_conv": True},
        {"shift_factor": None},
        {"scaling_factor": "1"},
        {"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]},
        {"block_out_channels": []},
        {"block_out_channels": [0, 32]},
        {"block_out_channels": [32, 0]},
        {"block_out_channels": 3},
        {"layers_per_block": -1},
    ],
)
def test_an_autoencoder_that_computes_something_else(change, vae):
    assert load_autoencoder(vae).config == AE_CONFIG
    values = json.loads((vae / "config.json").read_text()) | change
    (vae / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json cannot be used"):
        load_autoencoder(vae)
    assert "config.json cannot be used" in problems(vae, None)


def test_fields_that_older_files_lack(vae):
    values = json.loads((vae / "config.json").read_text())
    for name in ("norm_num_groups", "latents_mean", "mid_block_add_attention", "act_fn", "up_block_types"):
        del values[name]
    assert config_of(values) == AE_CONFIG
    with pytest.raises(ValueError, match="use_quant_conv is True"):  # diffusers' default
        config_of({name: x for name, x in values.items() if name != "use_quant_conv"})


def test_another_models_config_beside_an_autoencoder(tmp_path):
    """`config.json` in a folder of several models is another one's; beside diffusers' names it is theirs."""
    path, published = tmp_path / "ae.safetensors", AutoEncoderConfig()
    shutil.copy(AE / "weights_bfl.safetensors", path)
    for other in ({"_class_name": "FluxTransformer2DModel"}, {"d_model": 4096, "architectures": ["T5"]}):
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert read_config(path, published) == published  # as with nothing beside it
        theirs = path.rename(tmp_path / "diffusion_pytorch_model.safetensors")
        with pytest.raises(ValueError, match=r"config\.json cannot be used"):
            read_config(theirs, published)
        theirs.rename(path)
    (tmp_path / "config.json").write_text(json.dumps(FLUX1_AE.diffusers.json(AE_CONFIG)))
    assert load_autoencoder(path).config == AE_CONFIG
    (tmp_path / "ae.json").write_text('{"d_model": 4096}')
    with pytest.raises(ValueError, match=r"ae\.json cannot be used"):
        read_config(path, published)
