"""Whether weights are plain, and of the model that is wanted: told by names of tensors. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from flux_trainer.hub.contents import NOTE, Contents, read_contents
from flux_trainer.hub.detect import (
    CONFIG,
    ENCODER_STEM,
    Component,
    Place,
    belongs,
    config_beside,
    read_json,
    weights_in,
)
from flux_trainer.hub.errors import WeightsError

Part = Literal["transformer", "vae", "t5", "clip", "llm"]
"""Of a pipeline: what weights are to be."""

OF_TRANSFORMERS = ("model.diffusion_model.", "diffusion_model.")
OF_AUTOENCODERS = ("vae.", "first_stage_model.")
OF_A_PIPELINE = (  # prefixes in files that hold all of a pipeline
    *OF_AUTOENCODERS, "text_encoders.", "cond_stage_model.", "conditioner.", "text_encoder",
    *OF_TRANSFORMERS, "logit_scale", "model_ema.",
)  # fmt: skip

_STYLES = {
    "NVFP4": r"\.weight_scale_2$",
    "compressed-tensors": r"\.weight_(packed|global_scale|zero_point)$",
    "nunchaku's SVDQuant": r"\.(wscales|wtscale|smooth_factor|smooth)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros)$",
    "bitsandbytes in 4 bits": r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.",
    "bitsandbytes in 8 bits": r"\.(SCB|weight_format)$",
    "torchao": r"[._:](qdata|tensor_impl)$",
    "quanto": r"\.weight\._(data|scale|shift)$",
    "ComfyUI's comfy_quant": r"(^|\.)comfy_quant$",
    "scaled float8": r"(^|\.)(scaled_fp8|scale_weight|weight_scale(_inv)?|scale_input|input_scale)$",
}
"""Style -> the tensors that lie next to quantised weights in it; the first that fits counts."""
_LIST = "_quantization_metadata"
"""ComfyUI's list of quantised layers, in a header."""
_LOW_BITS = re.compile(r"F[46](_\w+)?|F8_E8M0|[IU]\d+")
"""Dtypes of no plain weights, by safetensors' names. A cast to float8 is plain: it has no scales."""

_T5, _CLIP, _LLM = "a T5 text encoder", "a CLIP text encoder", "a language model"
_FLUX, _VAE = "a FLUX transformer", "an autoencoder"
_MODELS = {
    "a LoRA": r"(^|[._])lora_(A|B|up|down|unet|te\d?|transformer)\b|^lora_|^lycoris_|"
    r"\.(lokr_w\d\w*|hada_w\d\w*|dora_scale|oft_blocks|diff|diff_b)$|\w_lora\d\.(up|down)\.",
    "a ControlNet": r"(^|\.)(controlnet_|control_model\.|input_hint_block)",
    "an IP-Adapter": r"(^|\.)(ip_adapter|image_proj\.|ip_layers|\w+_k_ip\b)",
    "FLUX.1-Redux's image embedder": r"^redux_(up|down)\.",
    "Chroma": r"(^|\.)distilled_guidance_layer\.",
    "Stable Diffusion 3": r"(^|\.)joint_blocks\.",
    "a UNet of Stable Diffusion": r"(^|\.)(input|output)_blocks\.\d|^(down|up)_blocks\.\d+\.(att|res)",
    _T5: r"(^|\.)block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)\.",
    _CLIP: r"(^|\.)(token_embedding|layers\.\d+\.self_attn\.out_proj)\.",
    _LLM: r"(^|\.)layers\.\d+\.mlp\.(gate|up|down)_proj\.",
    _VAE: r"^(vae\.|first_stage_model\.)?(encoder|decoder)\.(conv_in|conv_out|mid|down|up)",
    _FLUX: r"(^|\.)double_blocks\.\d+\.img_attn\.|(^|\.)single_transformer_blocks\.\d+\.",
}
"""What a file holds -> the names of tensors that tell it; the first that fits counts."""
_WANTED = {
    "transformer": (_FLUX, _VAE),  # `verify` and `convert` take both; training asks which it is
    "vae": (_VAE,),
    "t5": (_T5,),
    "clip": (_CLIP,),
    "llm": (_LLM,),
}


def plain_contents(place: Place, component: Component) -> Contents:
    """The tables of contents of safetensors files that may be a model's; errors as of `check_plain`."""
    contents = read_contents(place.path)
    beside = None if NOTE in contents.metadata else config_beside(place)  # which is no matter to our own
    kind = "Autoencoder" if _first(_MODELS[_VAE], contents.tensors) else "Transformer"
    own = beside and (belongs(beside[0], place) or kind in str(beside[1].get("_class_name")))
    check_plain(contents, component, beside[1] if beside and own else None)
    return contents


def encoder_contents(folder: Path, part: Part) -> Contents:
    """The same for the folder of a text encoder."""
    if (file := weights_in(folder, ENCODER_STEM)) is None:
        raise WeightsError(f"{folder} has no safetensors file.")
    contents, config = read_contents(file), folder / CONFIG
    check_plain(contents, part, read_json(config) if config.is_file() else None)
    return contents


def check_plain(contents: Contents, part: Part, config: Mapping[str, Any] | None = None) -> None:
    """Refuse what is no plain weights of such a model.

    Args:
        part: what they are to be; other parts in the same file may be of any kind.
        config: the model's config.json, if there is one.

    Raises:
        WeightsError: they are quantised, or of another model.
    """
    names = _of_part(contents.tensors, part)
    if style := _quantised(contents, names, config or {}):
        raise WeightsError(
            f"{contents.path} holds quantised weights ({style}), which are not read. "
            "Fetch the file they were made from, in bfloat16 or float16."
        )
    found = next((title for title, mark in _MODELS.items() if _first(mark, names)), None)
    if found and found not in _WANTED[part]:
        advice = " Merge it into the model that it changes, or give that model." if found == "a LoRA" else ""
        raise WeightsError(f"{contents.path} holds {found}, not {' or '.join(_WANTED[part])}.{advice}")


def _of_part(names: Iterable[str], part: Part) -> list[str]:
    """The names without those of a pipeline's other parts."""
    own = {"transformer": OF_TRANSFORMERS, "vae": OF_AUTOENCODERS}.get(part)
    if own is None:
        return list(names)
    return [name for name in names if name.startswith(own) or not name.startswith(OF_A_PIPELINE)]


def _quantised(contents: Contents, names: list[str], config: Mapping[str, Any]) -> str | None:
    """The style in which weights are quantised, with what shows it; None if they are not."""
    for style, mark in _STYLES.items():
        if name := _first(mark, names):
            return f"{style}: {name}"
    if layer := next((layer for layer in _listed(contents.metadata) if f"{layer}.weight" in names), None):
        return f"{_LIST} in the header: {layer}"
    tensors = contents.tensors
    for name in names:
        if name.endswith("weight") and _LOW_BITS.fullmatch(dtype := tensors[name].dtype):
            return f"{'whole numbers' if dtype[0] in 'IU' else dtype} in {name}"
    if stated := config.get("quantization_config"):
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        return f"quantization_config{f' {method}' if method else ''} in config.json"
    return None


def _first(mark: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if re.search(mark, name)), None)


def _listed(metadata: Mapping[str, str]) -> list[str]:
    """The layers that a header calls quantised."""
    try:
        return list(json.loads(metadata.get(_LIST, "{}")).get("layers", ()))
    except (ValueError, AttributeError, TypeError):  # no list of ComfyUI's
        return []
