"""diffusers' `config.json` of a model, from its config and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.configs import Flux1Config

_VERSION = "0.35.0"  # the oldest that is known to read these fields


@dataclass(frozen=True)
class Translation:
    """How a family's config is written for diffusers."""

    class_name: str
    write: Callable[[Any], dict[str, Any]]
    """All fields. ValueError where diffusers' class has no room for a setting."""
    read: Callable[[Mapping[str, Any]], Any]
    """The config; KeyError where a field is missing, ValueError where one has no counterpart here."""

    def json(self, config: Any) -> dict[str, Any]:
        """The content of `config.json`."""
        return {"_class_name": self.class_name, "_diffusers_version": _VERSION, **self.write(config)}


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
    if values.get("patch_size", 1) != 1:
        raise ValueError(f"patch_size is {values['patch_size']}; only 1 is known")
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


def _write_autoencoder(config: AutoEncoderConfig) -> dict[str, Any]:
    if config.ch_mult[0] != 1:
        raise ValueError(
            f"diffusers' AutoencoderKL cannot hold an autoencoder with ch_mult = {list(config.ch_mult)}: "
            "its first block is as wide as its first convolution. Write --to bfl."
        )
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * len(config.ch_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.ch_mult),
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": config.z_channels,
        "norm_num_groups": 32,
        "sample_size": config.resolution,
        "scaling_factor": config.scale_factor,
        "shift_factor": config.shift_factor,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }


def _read_autoencoder(values: Mapping[str, Any]) -> AutoEncoderConfig:
    for name in ("use_quant_conv", "use_post_quant_conv"):
        if values.get(name, True):
            raise ValueError(f"{name} is not false: this is no autoencoder of FLUX.1")
    widths = values["block_out_channels"]
    return AutoEncoderConfig(
        resolution=values.get("sample_size", 256),
        in_channels=values["in_channels"],
        ch=widths[0],
        out_ch=values["out_channels"],
        ch_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=values["layers_per_block"],
        z_channels=values["latent_channels"],
        scale_factor=values["scaling_factor"],
        shift_factor=values["shift_factor"],
    )


FLUX1 = Translation("FluxTransformer2DModel", _write_flux1, _read_flux1)
FLUX1_AE = Translation("AutoencoderKL", _write_autoencoder, _read_autoencoder)
