"""Trains the small autoencoder of `assets/autoencoder/` on the training split of `assets/emoji/`.

It has the layout of FLUX.1's (8x down, 16 latent channels) at a thirtieth of its parameters, so that the
default run encodes to and decodes from real latents. Plain PyTorch: reconstruction loss (L1, L2, and L1 of
the image's gradients), a small KL term, Muon for the convolutions and AdamW for the rest, a cosine schedule,
a moving average of the weights. The KL term makes the posterior noisy, and the decoder sees samples of it: it
tolerates latents that a diffusion model gets slightly wrong.

    python assets/train_autoencoder.py --minutes 60

The schedule follows the clock, so that the run ends when it says. Every few minutes the averaged weights are
rounded to bf16, evaluated on the held-out pictures and written with their config, and the training state is
saved: the same command goes on from there. `--weights` starts a new run from written weights; with
`--decoder-only` the encoder, and so every latent and all that was trained on them, stays as it is.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux_trainer.hub.autoencoder import read_config
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig, Downsample, ResnetBlock, Upsample

ASSETS = Path(__file__).parent
CONFIG = AutoEncoderConfig(
    resolution=64, ch=32, ch_mult=(1, 1, 2, 4), num_res_blocks=1, scale_factor=1.0, shift_factor=0.0
)
FINAL_LR, WARMUP = 1e-5, 0.02  # the latter as a part of the whole run
BATCH = 8  # pictures of 64x64, or a quarter as many of 128x128
KL_WEIGHT = 5e-4  # times the mean over latent elements
EMA_DECAY = 0.995


def load_split(split: str, size: int) -> Tensor:
    """All pictures of a split, [N, 3, size, size] uint8."""
    lines = (ASSETS / "emoji" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    pictures = []
    for line in lines:
        with Image.open(ASSETS / "emoji" / json.loads(line)["file_name"]) as file:
            picture = file.convert("RGB")
            if picture.size != (size, size):
                picture = picture.resize((size, size), Image.Resampling.LANCZOS)
            pictures.append(np.asarray(picture))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


class Batches:
    """Random batches: whole pictures at 64 px (moved a little), 64-px crops of other scales, 128 px."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.small = load_split("train", 64)
        self.large = load_split("train", 128)

    def _pick(self, source: Tensor, count: int) -> Tensor:
        return to_unit(source[torch.from_numpy(self.rng.integers(len(source), size=count))])

    def _crop(self, pictures: Tensor) -> Tensor:
        top, left = self.rng.integers(pictures.shape[-1] - 64 + 1, size=2)
        return pictures[..., top : top + 64, left : left + 64]

    def draw(self, size: int) -> Tensor:
        """[BATCH, 3, 64, 64] or [BATCH / 4, 3, 128, 128] in [-1, 1]."""
        if size == 128:
            x = self._pick(self.large, BATCH // 4)
        elif self.rng.random() < 0.6:
            x = self._crop(F.pad(self._pick(self.small, BATCH), (4, 4, 4, 4), value=1.0))
        else:
            x = self._pick(self.large, BATCH)
            scaled = int(self.rng.integers(72, 129))
            x = self._crop(
                F.interpolate(x, size=(scaled, scaled), mode="bicubic", antialias=True).clamp(-1, 1)
            )
        flip = torch.from_numpy(self.rng.random((len(x), 1, 1, 1)) < 0.5)
        x = torch.where(flip, x.flip(-1), x)
        if self.rng.random() < 0.2:  # other colours: channels permuted, and white turned into a light tint
            x = x[:, torch.from_numpy(self.rng.permutation(3))]
            tint = torch.from_numpy(self.rng.uniform(0.5, 1, (len(x), 3, 1, 1)).astype(np.float32))
            x = (x + 1) * tint - 1
        return x.contiguous()


def initialise(model: AutoEncoder) -> None:
    """Residual blocks start as identities, the convolutions between them keep the variance, and the posterior
    starts narrow: with PyTorch's initialisation its noise drowns the mean, and nothing is learnt for long."""
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Downsample | Upsample):
            nn.init.normal_(module.conv.weight, std=module.conv.weight[0].numel() ** -0.5)
    with torch.no_grad():
        moments = model.encoder.conv_out
        moments.weight[: CONFIG.z_channels] *= 3
        moments.bias[CONFIG.z_channels :] -= 6


def build_optimizers(
    model: AutoEncoder, lr: float
) -> tuple[tuple[torch.optim.Optimizer, ...], list[tuple[nn.Parameter, nn.Parameter]]]:
    """Muon for the convolutions between wide layers, as matrices [out, in*kh*kw], and AdamW for all else.

    Also returns the pairs (weight, matrix): the matrix shares the weight's memory, and needs its gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    wide = [p for p in parameters if p.ndim == 4 and min(p.shape[:2]) >= 16]
    others = [p for p in parameters if not any(p is w for w in wide)]
    matrices = [nn.Parameter(p.detach().flatten(1)) for p in wide]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return (muon, adamw), list(zip(wide, matrices, strict=True))


def loss_of(model: AutoEncoder, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss of images x [B, 3, H, W] and the reconstruction's mean squared error."""
    with torch.autocast(x.device.type, torch.bfloat16):
        mean, logvar = model.moments(x)
        mean, logvar = mean.float(), logvar.float()
        reconstruction = model.decode(mean + torch.exp(0.5 * logvar) * noise)
    error = reconstruction.float() - x
    l1, l2 = error.abs().mean(), error.square().mean()
    sharpness = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    # KL(N(mean, exp(logvar)) || N(0, 1)), a mean over latent elements
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return l1 + 4 * l2 + 0.25 * sharpness + KL_WEIGHT * kl, l2.detach()


@torch.no_grad()
def psnr(model: AutoEncoder, pictures: Tensor) -> tuple[float, float]:
    """PSNR in dB for images in [0, 1]: of the mean squared error over all, and the mean over images."""
    errors = []
    for batch in pictures.split(8):
        x = to_unit(batch)
        difference = (model.decode(model.encode(x)).clamp(-1, 1) - x) / 2
        errors.append(difference.square().mean(dim=(1, 2, 3)))
    mse = torch.cat(errors)
    return -10 * math.log10(mse.mean().item()), -10 * mse.log10().mean().item()


@torch.no_grad()
def measure_latents(model: AutoEncoder, pictures: Tensor) -> Tensor:
    """Sampled z of all pictures, [N, 16, h, w]: what the shift and scale are measured on."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for batch in pictures.split(32):
        mean, logvar = model.moments(to_unit(batch))
        samples.append(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator))
    return torch.cat(samples)


def export(
    weights: dict[str, Tensor],
    train: Tensor,
    held_out: dict[int, Tensor],
    out: Path,
    config: AutoEncoderConfig | None = None,
) -> str:
    """Write `weights` in bf16 with a config; return the measured figures.

    Without `config` the one written normalises the latents of the pictures `train`.
    """
    rounded = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    model = AutoEncoder(CONFIG)
    model.load_state_dict({name: weight.float() for name, weight in rounded.items()})
    z = measure_latents(model, train)
    config = config or replace(
        CONFIG, scale_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4)
    )
    model.config = config
    out.mkdir(parents=True, exist_ok=True)
    save_file(rounded, out / "ae.safetensors.part")
    (out / "ae.safetensors.part").replace(out / "ae.safetensors")
    (out / "ae.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    figures = [f"scale {config.scale_factor} shift {config.shift_factor}"]
    figures += [
        "PSNR at {} px: {:.2f} dB (mean of images {:.2f})".format(s, *psnr(model, p))
        for s, p in held_out.items()
    ]
    deviations = (z * config.scale_factor).std(dim=(0, 2, 3))
    figures.append("deviation per channel " + " ".join(f"{d:.2f}" for d in deviations.tolist()))
    return "\n  ".join(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="length of the run by the clock")
    parser.add_argument("--save-every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--weights", type=Path, help="start from this ae.safetensors instead of random weights"
    )
    parser.add_argument("--decoder-only", action="store_true", help="leave the encoder of --weights as it is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ASSETS / "autoencoder")
    parser.add_argument("--state", type=Path, default=Path("outputs/autoencoder/state.pt"))
    args = parser.parse_args()
    if args.decoder_only and not args.weights:
        parser.error("--decoder-only needs --weights: whose encoder would it leave as it is?")

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    held_out = {size: load_split("validation", size) for size in (64, 128)}
    model = AutoEncoder(CONFIG)
    initialise(model)
    if args.weights:
        model.load_state_dict({name: weight.float() for name, weight in load_file(args.weights).items()})
    model.encoder.requires_grad_(not args.decoder_only)
    config = read_config(args.weights) if args.decoder_only else None
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimizers, matrices = build_optimizers(model, args.lr)
    step, minutes = 0, 0.0
    if args.state.is_file():
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, step, minutes = state["average"], state["step"], state["minutes"]
    batches = Batches(args.seed + step)
    torch.manual_seed(args.seed + step)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(batches.small)} training pictures", flush=True)

    def save(train: Tensor) -> None:
        print(" ", export(average, train, held_out, args.out, config), flush=True)
        args.state.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        torch.save({**state, "average": average, "step": step, "minutes": minutes}, args.state)

    last = reported = time.monotonic()
    next_save, images, errors = minutes + args.save_every, 0, []
    while minutes < args.minutes:
        part = minutes / args.minutes
        cosine = 0.5 * (1 + math.cos(math.pi * part))
        lr = min(1.0, max(part, 1e-3) / WARMUP) * (FINAL_LR + (args.lr - FINAL_LR) * cosine)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
        x = batches.draw(128 if step % 8 == 7 else 64)
        noise = torch.randn(len(x), CONFIG.z_channels, x.shape[-2] // 8, x.shape[-1] // 8)
        loss, l2 = loss_of(model, x, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for weight, matrix in matrices:
            matrix.grad = weight.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        step, images = step + 1, images + len(x)
        errors.append(l2)
        decay = min(EMA_DECAY, step / (step + 10))
        for name, weight in model.state_dict().items():
            average[name].lerp_(weight, 1 - decay)

        now = time.monotonic()
        minutes, last = minutes + (now - last) / 60, now
        if now - reported >= 30:
            mse = torch.stack(errors).mean().item() / 4  # of images in [0, 1]
            print(
                f"step {step:6d}  loss {loss.item():.4f}  PSNR {-10 * math.log10(mse):.2f} dB  "
                f"lr {lr:.1e}  {images / (now - reported):.1f} images/s  "
                f"{args.minutes - minutes:.1f} min left",
                flush=True,
            )
            reported, images, errors = now, 0, []
        if minutes >= next_save:
            next_save += args.save_every
            save(batches.small[::8])
    print(f"done after {step} steps", flush=True)
    save(batches.small)


if __name__ == "__main__":
    main()
