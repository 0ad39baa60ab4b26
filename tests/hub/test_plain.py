"""Quantised weights and other models are named; plain weights next to quantised parts are taken."""

import json

import pytest
import torch
from helpers import weights_files
from helpers.headers import shapes_of, write_header
from safetensors.torch import save_file

from flux_trainer.cli.weights import find_weights
from flux_trainer.hub.contents import read_contents
from flux_trainer.hub.detect import locate
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.plain import check_plain, plain_contents
from flux_trainer.hub.verify import verify
from flux_trainer.hub.weights import open_weights

FP8, U8 = torch.float8_e4m3fn, torch.uint8
LAYER = "double_blocks.0.img_mlp.0"

# Style -> the tensors that it has in place of a linear's weight.
STYLES = {
    "scaled float8": {"weight": torch.zeros(2, dtype=FP8), "scale_weight": torch.ones(())},
    "scaled float8: .*weight_scale": {"weight": torch.zeros(2, dtype=FP8), "weight_scale": torch.ones(())},
    "scaled float8: .*weight_scale_inv": {
        "weight": torch.zeros(2, dtype=FP8),
        "weight_scale_inv": torch.ones(1),
    },
    "NVFP4": {
        "weight": torch.zeros(2, dtype=U8),
        "weight_scale": torch.zeros(1, dtype=FP8),
        "weight_scale_2": torch.ones(()),
    },
    "ComfyUI's comfy_quant": {"weight": torch.zeros(2, dtype=FP8), "comfy_quant": torch.zeros(2, dtype=U8)},
    "bitsandbytes in 4 bits": {"weight": torch.zeros(2, 1, dtype=U8), "weight.absmax": torch.ones(1)},
    "bitsandbytes in 8 bits": {"weight": torch.zeros(2, dtype=torch.int8), "SCB": torch.ones(1)},
    "compressed-tensors": {"weight_packed": torch.zeros(2, dtype=U8), "weight_global_scale": torch.ones(1)},
    "GPTQ or AWQ": {"qweight": torch.zeros(2, dtype=torch.int32), "scales": torch.ones(1)},
    "nunchaku's SVDQuant": {"qweight": torch.zeros(2, dtype=torch.int8), "wscales": torch.ones(1)},
    "quanto": {"weight._data": torch.zeros(2, dtype=torch.int8), "weight._scale": torch.ones(1)},
    "torchao": {"weight:qdata": torch.zeros(2, dtype=FP8)},
    "whole numbers": {"weight": torch.zeros(2, dtype=torch.int8)},
}


def refusals(path) -> list[str]:
    """What `verify` and `generate` say of weights that both refuse."""
    with pytest.raises(WeightsError) as error:
        find_weights(str(path))
    [report] = verify(path)
    [problem] = report.problems
    return [problem, str(error.value)]


@pytest.mark.parametrize("style", STYLES)
def test_quantised_weights_are_named(style, tmp_path):
    weights = weights_files.native()
    del weights[f"{LAYER}.weight"]
    weights |= {f"{LAYER}.{name}": x for name, x in STYLES[style].items()}
    for prefix in ("", "model.diffusion_model."):
        save_file({prefix + name: x for name, x in weights.items()}, tmp_path / "x.safetensors")
        told = refusals(tmp_path / "x.safetensors")
        assert told[0] == told[1]
        check = pytest.raises(WeightsError, match=rf"holds quantised weights \({style}.*Fetch the file they")
        with check:
            check_plain(read_contents(tmp_path / "x.safetensors"), "transformer")


def test_marks_of_a_whole_file(tmp_path):
    """A key alone, ComfyUI's list in the header, and quantization_config in config.json."""
    path, weights = tmp_path / "x.safetensors", weights_files.native()
    save_file(weights | {"scaled_fp8": torch.zeros(0, dtype=FP8)}, path)
    assert "quantised weights (scaled float8: scaled_fp8)" in refusals(path)[1]
    listed = {"format_version": "1.0", "layers": {LAYER: {"format": "float8_e4m3fn"}}}
    save_file(weights, path, metadata={"_quantization_metadata": json.dumps(listed)})
    assert f"(_quantization_metadata in the header: {LAYER})" in refusals(path)[1]
    folder = weights_files.diffusers(tmp_path) / "transformer"
    values = json.loads((folder / "config.json").read_text())
    assert not verify(folder)[0].problems
    for stated in ({"quant_method": "bitsandbytes"}, "odd"):
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
        assert "quantised weights (quantization_config" in refusals(folder)[1]


@pytest.mark.parametrize("note", ["{", "[]", '{"layers": 3}', '{"layers": {"other": {}}}'])
def test_what_is_quantised_elsewhere_is_no_matter(note, tmp_path):
    """Another part of a pipeline's file, or a list that says nothing of these weights; a cast to float8."""
    weights = {f"model.diffusion_model.{name}": x.to(FP8) for name, x in weights_files.native().items()}
    weights |= {
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(0, dtype=FP8),
        "text_encoders.t5xxl.a.scale_weight": torch.ones(()),
    }
    save_file(weights, tmp_path / "x.safetensors", metadata={"_quantization_metadata": note})
    open_weights(tmp_path / "x.safetensors", config=weights_files.CONFIG)


def test_another_models_config_is_no_matter(tmp_path):
    """An autoencoder next to the config.json of a transformer that is quantised."""
    write_header(tmp_path / "ae.safetensors", {"encoder.conv_in.weight": (2, 2)})
    stated = {
        "_class_name": "FluxTransformer2DModel",
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    for component in ("vae", "transformer"):
        plain_contents(locate(tmp_path / "ae.safetensors"), component)
    (tmp_path / "config.json").write_text(json.dumps(stated | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(WeightsError, match="quantization_config bitsandbytes in config"):
        plain_contents(locate(tmp_path / "ae.safetensors"), "vae")


MODELS = {
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA",
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "a LoRA",
    "double_blocks.0.processor.qkv_lora1.down.weight": "a LoRA",
    "lycoris_double_blocks_0_img_attn_qkv.lokr_w1": "a LoRA",
    "diffusion_model.double_blocks.0.img_attn.qkv.diff": "a LoRA",
    "controlnet_blocks.0.weight": "a ControlNet",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": "an IP-Adapter",
    "redux_up.weight": "FLUX.1-Redux's image embedder",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
    "model.diffusion_model.input_blocks.0.0.weight": "a UNet of Stable Diffusion",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet of Stable Diffusion",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a T5 text encoder",
    "text_model.embeddings.token_embedding.weight": "a CLIP text encoder",
    "model.layers.0.mlp.gate_proj.weight": "a language model",
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_named(name, tmp_path):
    """Also where all of a FLUX transformer is in the file, as of a ControlNet and of Chroma."""
    for more in ({}, {n: tuple(x.shape) for n, x in weights_files.native().items()}):
        write_header(tmp_path / "x.safetensors", {name: (2, 2), **more})
        told = refusals(tmp_path / "x.safetensors")
        assert told[0] == told[1]
        assert f"holds {MODELS[name]}, not a FLUX transformer or an autoencoder." in told[0]


@pytest.mark.parametrize("flavor", ["flux-tiny", "flux2-tiny"])
def test_a_transformer_in_place_of_something_else(flavor, tmp_path):
    write_header(tmp_path / "x.safetensors", shapes_of(flavor, "bfl"))
    contents = read_contents(tmp_path / "x.safetensors")
    check_plain(contents, "transformer")
    for part, title in (
        ("vae", "an autoencoder"),
        ("t5", "a T5 text encoder"),
        ("clip", "a CLIP text encoder"),
        ("llm", "a language model"),
    ):
        with pytest.raises(WeightsError, match=f"holds a FLUX transformer, not {title}"):
            check_plain(contents, part)
