"""diffusers' `config.json` of a model, from its config and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flux_trainer.models.autoencoder import AutoEncoderConfig, AutoEncoderSizes
from flux_trainer.models.autoencoder2 import PATCH, AutoEncoder2Config, LatentNorm
from flux_trainer.models.configs import TIME_DIM, Flux1Config, Flux2Config
from flux_trainer.models.layers import NORM_EPS


@dataclass(frozen=True)
class Translation:
    """How a family's config is written for diffusers."""

    class_name: str
    write: Callable[[Any], dict[str, Any]]
    """All fields. ValueError where diffusers' class has no room for a setting."""
    read: Callable[[Mapping[str, Any]], Any]
    """The config; KeyError where a field is missing, ValueError where one has no counterpart here."""
    version: str
    """Of diffusers, the oldest that is known to read these fields."""

    def json(self, config: Any) -> dict[str, Any]:
        """The content of `config.json`."""
        return {"_class_name": self.class_name, "_diffusers_version": self.version, **self.write(config)}


def _write_flux1(config: Flux1Config) -> dict[str, Any]:
    fixed = {"mlp_ratio": 4.0, "theta": 10_000, "qkv_bias": True}
    if wrong := [
        f"{name} = {getattr(config, name)}" for name, x in fixed.items() if getattr(config, name) != x
    ]:
        raise ValueError(
            f"diffusers' FluxTransformer2DModel cannot hold a model with {', '.join(wrong)}: it has "
            f"{', '.join(f'{name} {value}' for name, value in fixed.items())} built in. Write --to bfl."
        )
    return {
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def _read_flux1(values: Mapping[str, Any]) -> Flux1Config:
    # Fields that older files lack have diffusers' defaults.
    _expect(values, patch_size=1)
    heads = values["num_attention_heads"]
    return Flux1Config(
        in_channels=values["in_channels"],
        out_channels=values.get("out_channels") or values["in_channels"],
        vec_in_dim=values["pooled_projection_dim"],
        context_in_dim=values["joint_attention_dim"],
        hidden_size=heads * values["attention_head_dim"],
        mlp_ratio=4.0,
        num_heads=heads,
        depth=values["num_layers"],
        depth_single_blocks=values["num_single_layers"],
        axes_dim=tuple(values.get("axes_dims_rope", (16, 56, 56))),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=values.get("guidance_embeds", False),
    )


def _write_flux2(config: Flux2Config) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,  # as many
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "timestep_guidance_channels": TIME_DIM,
        "mlp_ratio": config.mlp_ratio,
        "axes_dims_rope": list(config.axes_dim),
        "rope_theta": config.theta,
        "eps": NORM_EPS,
        "guidance_embeds": config.use_guidance_embed,
    }


def _read_flux2(values: Mapping[str, Any]) -> Flux2Config:
    # Fields that older files lack have diffusers' defaults, dev's values.
    _expect(values, patch_size=1, timestep_guidance_channels=TIME_DIM, eps=NORM_EPS)
    if values.get("out_channels") not in (None, values["in_channels"]):
        raise ValueError(f"out_channels is {values['out_channels']}; only that of in_channels is known")
    heads = values["num_attention_heads"]
    return Flux2Config(
        in_channels=values["in_channels"],
        context_in_dim=values["joint_attention_dim"],
        hidden_size=heads * values["attention_head_dim"],
        num_heads=heads,
        depth=values["num_layers"],
        depth_single_blocks=values["num_single_layers"],
        axes_dim=tuple(values.get("axes_dims_rope", (32, 32, 32, 32))),
        theta=values.get("rope_theta", 2000),
        mlp_ratio=values.get("mlp_ratio", 3.0),
        use_guidance_embed=values.get("guidance_embeds", True),
    )


_COMMON = {  # what is built in, with or without a field for it
    "act_fn": "silu",
    "norm_num_groups": 32,
    "mid_block_add_attention": True,
}
_FLUX1_AE = {
    **_COMMON,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_FLUX2_AE = {
    **_COMMON,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "batch_norm_eps": LatentNorm.EPS,
    "patch_size": [PATCH, PATCH],
}


def _write_sizes(config: AutoEncoderSizes, class_name: str) -> dict[str, Any]:
    """What both autoencoders have."""
    if config.ch_mult[0] != 1:
        raise ValueError(
            f"diffusers' {class_name} cannot hold an autoencoder with ch_mult = {list(config.ch_mult)}: "
            "its first block is as wide as its first convolution. Write --to bfl."
        )
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.ch_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.ch_mult),
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "sample_size": config.resolution,
    }


def _read_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    widths = values["block_out_channels"]
    for kind, block in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        if odd := set(values.get(f"{kind}_block_types", ())) - {block}:
            raise ValueError(f"{kind}_block_types has {', '.join(odd)}; only {block} is known")
    return {
        "resolution": values.get("sample_size", 256),
        "in_channels": values["in_channels"],
        "ch": widths[0],
        "out_ch": values["out_channels"],
        "ch_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": values["layers_per_block"],
        "z_channels": values["latent_channels"],
    }


def _write_autoencoder(config: AutoEncoderConfig) -> dict[str, Any]:
    return {
        **_write_sizes(config, "AutoencoderKL"),
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "force_upcast": True,
        **_FLUX1_AE,
    }


def _read_autoencoder(values: Mapping[str, Any]) -> AutoEncoderConfig:
    # diffusers' defaults of these two are not FLUX.1's values.
    _expect({"use_quant_conv": True, "use_post_quant_conv": True, **values}, **_FLUX1_AE)
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(values[name], int | float):
            raise ValueError(f"{name} is {values[name]}; it must be a number")
    return AutoEncoderConfig(
        **_read_sizes(values),
        scale_factor=values["scaling_factor"],
        shift_factor=values["shift_factor"],
    )


def _write_autoencoder2(config: AutoEncoder2Config) -> dict[str, Any]:
    return {**_write_sizes(config, "AutoencoderKLFlux2"), **_FLUX2_AE, "batch_norm_momentum": 0.1}


def _read_autoencoder2(values: Mapping[str, Any]) -> AutoEncoder2Config:
    _expect(values, **_FLUX2_AE)
    if values.get("decoder_block_out_channels") not in (None, values["block_out_channels"]):
        raise ValueError("decoder_block_out_channels is not block_out_channels: a small decoder is not known")
    return AutoEncoder2Config(**_read_sizes(values))


def _expect(values: Mapping[str, Any], **known: Any) -> None:
    """Raise ValueError where a field has another value than the one that is built in here."""
    for name, value in known.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} is {values[name]}; only {value} is known")


FLUX1 = Translation("FluxTransformer2DModel", _write_flux1, _read_flux1, "0.35.0")
FLUX2 = Translation("Flux2Transformer2DModel", _write_flux2, _read_flux2, "0.37.0")
FLUX1_AE = Translation("AutoencoderKL", _write_autoencoder, _read_autoencoder, "0.35.0")
FLUX2_AE = Translation("AutoencoderKLFlux2", _write_autoencoder2, _read_autoencoder2, "0.37.0")
