"""The small autoencoder in FLUX.2's form, made from the one in FLUX.1's: nothing is trained.

    python assets/build_flux2_autoencoder.py

The 16 channels of `autoencoder/ae.safetensors` become the first 16 of 32; the others are always zero,
and the decoder does not look at them. The 1x1 convolutions are the identity; the statistics of the
normalisation are those of the emoji's training images. So images and their latents are the same as before,
but for the normalisation, and FLUX.2's whole path runs on a laptop.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_trainer.hub.autoencoder import load_autoencoder
from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config

ASSETS = Path(__file__).parent
OUT = ASSETS / "autoencoder" / "flux2_ae"


def main() -> None:
    source = load_autoencoder(ASSETS / "autoencoder" / "ae.safetensors", torch.float32)
    sizes = {
        key: value
        for key, value in asdict(source.config).items()
        if key not in ("scale_factor", "shift_factor")
    }
    config = AutoEncoder2Config(**{**sizes, "z_channels": 2 * source.config.z_channels})
    model = AutoEncoder2(config)
    model.load_state_dict(wider(source.state_dict(), model.state_dict(), source.config.z_channels))
    with torch.no_grad():
        mean, _ = model.moments(images())  # [B, 128, h, w]
    model.bn.running_mean.copy_(mean.mean((0, 2, 3)))
    model.bn.running_var.copy_(mean.var((0, 2, 3)))
    tensors = {
        name: tensor if name.startswith("bn.") else tensor.to(torch.bfloat16)
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, OUT.with_suffix(".safetensors"))
    OUT.with_suffix(".json").write_text(json.dumps(asdict(config), indent=2) + "\n")


def wider(old: dict[str, Tensor], new: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The old weights in the new shapes."""
    weights = {name: old.get(name, torch.zeros_like(tensor)) for name, tensor in new.items()}
    for leaf, dim, parts in (("encoder.conv_out", 0, 2), ("decoder.conv_in", 1, 1)):
        name = f"{leaf}.weight"
        pieces = [(piece, torch.zeros_like(piece)) for piece in old[name].chunk(parts, dim)]
        weights[name] = torch.cat([each for pair in pieces for each in pair], dim)
    mean, logvar = old["encoder.conv_out.bias"].chunk(2)
    # No variance where nothing is.
    weights["encoder.conv_out.bias"] = torch.cat(
        (mean, torch.zeros(channels), logvar, torch.full((channels,), -30.0))
    )
    for name in ("encoder.quant_conv.weight", "decoder.post_quant_conv.weight"):
        weights[name] = torch.eye(len(new[name]))[:, :, None, None]
    return weights


def images() -> Tensor:
    """The training set [B, 3, 64, 64] in [-1, 1]."""
    folder = ASSETS / "emoji"
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    key = next(key for key, value in lines[0].items() if str(value).endswith((".png", ".webp", ".jpg")))
    pictures = []
    for line in lines:
        picture = Image.open(folder / line[key]).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        data = torch.frombuffer(
            bytearray(canvas.convert("RGB").resize((64, 64)).tobytes()), dtype=torch.uint8
        )
        pictures.append(data.view(64, 64, 3).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(pictures)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
