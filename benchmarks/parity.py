"""How far this code is from diffusers and from Black Forest Labs': figures and pictures, as a page.

    python benchmarks/parity.py WEIGHTS [--ema] [--images FOLDER] [--prompts TEXT ...] [--out docs]

WEIGHTS: a run's folder, a checkpoint, a file of Black Forest Labs or a diffusers folder, as `flux-trainer
generate` takes them. diffusers gets the weights by `flux-trainer convert`, and opens them itself. Both then
compute velocities and losses of the images and draw the prompts, from the same noise and text features.
Writes parity.md and parity.png into --out. Flags that follow are settings, such as those of [encoder].
"""

import argparse
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from golden import Row, absolute, golden_rows
from torch import Tensor

from flux_trainer.checkpoint.errors import CheckpointError
from flux_trainer.cli.weights import find_weights, scales
from flux_trainer.config.load import load
from flux_trainer.config.pictures import Request
from flux_trainer.config.schema import JobConfig, Source
from flux_trainer.data.bad import BadSamples
from flux_trainer.data.loader import ValidationLoader
from flux_trainer.data.samples import Batch, ValidationSamples
from flux_trainer.encoders.bundle import Encoders
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.flow.latents import FLUX1
from flux_trainer.hub.convert import convert
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import open_weights
from flux_trainer.metrics.pictures import grid
from flux_trainer.models import registry
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.mesh import DataGroup
from flux_trainer.runtime.dist import init_distributed
from flux_trainer.sample import denoise, sampler_mu
from flux_trainer.validate import validation_loss
from flux_trainer.velocity import Velocity

IMAGES = Path(__file__).parents[1] / "assets" / "emoji" / "validation.jsonl"
PROMPTS = ["red apple", "grinning face", "dog face", "sunflower"]
SEED = 0

Predict = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Setup:
    """Both implementations with the same weights, on one device, in one dtype."""

    config: JobConfig
    encoders: Encoders
    ours: Velocity
    transformer: Any
    """diffusers' FluxTransformer2DModel."""
    vae: Any
    """diffusers' AutoencoderKL."""
    device: torch.device
    dtype: torch.dtype

    def theirs(self, x: Tensor, t: Tensor, txt: Tensor, vec: Tensor, guidance: Tensor | None) -> Tensor:
        """diffusers' velocity, with the arguments and the result of `Velocity`."""
        height, width = x.shape[2:]
        tokens = self.transformer(
            hidden_states=FLUX1.pack(x).to(self.dtype),
            timestep=t,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            pooled_projections=vec.to(self.dtype),
            encoder_hidden_states=txt.to(self.dtype),
            txt_ids=FLUX1.text_ids(1, txt.shape[1], self.device)[0],
            img_ids=FLUX1.image_ids(1, height, width, self.device)[0],
            return_dict=False,
        )[0]
        return FLUX1.unpack(tokens, height, width)

    def guidance(self, count: int) -> Tensor | None:
        """As in training."""
        if not self.ours.config.guidance_embed:
            return None
        return torch.full((count,), self.config.flow.guidance, device=self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder or .jsonl, images with captions")
    parser.add_argument("--samples", type=int, default=32, help="of the images, for the loss")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--steps", type=int, help="Euler steps; default: as suits the flavor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args, flags = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        try:
            if not args.images.exists():
                raise FileNotFoundError(f"--images {args.images}: there is no such file or folder")
            setup = prepare(args, flags, Path(scratch))
        except (ValueError, OSError, CheckpointError) as error:
            sys.exit(str(error))
        rows = [*forward_rows(setup), *autoencoder_rows(setup, batches(setup, args))]
        losses = loss_rows(setup, args)
        sheet, row = pictures(setup, args)
        args.out.mkdir(parents=True, exist_ok=True)
        sheet.save(args.out / "parity.png")
        with torch.enable_grad():
            golden = golden_rows()
        text = page(args, setup, [*rows, row], losses, golden)
        (args.out / "parity.md").write_text(text, encoding="utf-8")
    print(text)


def prepare(args: argparse.Namespace, flags: list[str], scratch: Path) -> Setup:
    """Load the weights twice: natively, and as diffusers opens what was converted for it."""
    import diffusers

    weights = find_weights(args.weights)
    # The encoders are the same for both: their dtype only has to be wide enough.
    widths = [f"--encoder.{key}=float32" for key in ("dtype", "autoencoder_dtype")]
    config, _, _ = load([*flags, *widths], weights.settings)
    device = init_distributed().device
    dtype: torch.dtype = getattr(torch, args.dtype)
    shape = registry.FLAVORS[config.model.flavor]
    model = registry.build(config.model.name, config.model.flavor).to(device, dtype).requires_grad_(False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    print(load_weights(weights.path, parameters, config=shape, ema=args.ema), file=sys.stderr)

    parts = {}
    for component, path, reader in (
        ("transformer", weights.path, diffusers.FluxTransformer2DModel),
        ("vae", Path(config.encoder.autoencoder_path), diffusers.AutoencoderKL),
    ):
        source = open_weights(path, component, ema=args.ema and component == "transformer", ahead=True)
        convert(source, scratch / component, "diffusers")
        wide = dtype if component == "transformer" else torch.float32
        part, info = reader.from_pretrained(scratch / component, torch_dtype=wide, output_loading_info=True)
        assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")), info
        parts[component] = part.to(device).eval().requires_grad_(False)
    encoders = Encoders(config.encoder, device, config.debug.seed)
    velocity = Velocity(Parallel([model], {}, None, None), shape, device)
    return Setup(config, encoders, velocity, parts["transformer"], parts["vae"], device, dtype)


def features(setup: Setup, texts: list[str]) -> dict[str, TextFeatures]:
    encoded = setup.encoders.text.encode(setup.encoders.text.tokenize(texts))
    return {text: TextFeatures(encoded.txt[i], encoded.vec[i]) for i, text in enumerate(texts)}


def forward_rows(setup: Setup) -> list[Row]:
    """The velocity at random latents of several sizes and times."""
    side = setup.config.training.img_size // 8
    text = features(setup, ["red apple", ""])
    txt, vec = (torch.stack([getattr(f, name) for f in text.values()]) for name in ("txt", "vec"))
    rows = []
    for height, width in ((side, side), (side, side // 2)):
        draws = torch.arange(2, device=setup.device)
        x = rng.normal(SEED, rng.Purpose.PICTURE, draws, (16, height, width))
        t = torch.tensor([0.9, 0.3], device=setup.device)
        given = (x, t, txt, vec, setup.guidance(2))
        difference = absolute(setup.ours(*given).float(), setup.theirs(*given).float())
        rows.append((f"velocity, {8 * width} x {8 * height} px, t = 0.9 and 0.3", diffusers(), difference))
    return rows


def diffusers() -> str:
    return f"diffusers {version('diffusers')}"


def batches(setup: Setup, args: argparse.Namespace) -> list[Batch]:
    """The images, at even distances through their source."""
    config = setup.config
    kind = "folder" if args.images.is_dir() else "jsonl"
    samples = ValidationSamples(
        [Source(type=kind, path=str(args.images))],
        count=args.samples,
        image_size=config.training.img_size,
        max_pixels=config.data.max_pixels,
    )
    loader = ValidationLoader(
        config.data,
        samples,
        tokenize=setup.encoders.text.tokenizers.tokenize,
        batch_size=8,
        rank=0,
        world_size=1,
    )
    return list(loader)


def autoencoder_rows(setup: Setup, batches: list[Batch]) -> list[Row]:
    """Latents of the first images, and images of these latents."""
    vae, images = setup.vae, batches[0].images
    ours = setup.encoders.encode_images(images)
    pixels = images.to(setup.device).float() / 127.5 - 1
    z = vae.encode(pixels).latent_dist.mean
    theirs = (z - vae.config.shift_factor) * vae.config.scaling_factor
    decoded = vae.decode(ours / vae.config.scaling_factor + vae.config.shift_factor).sample
    return [
        ("latents of images", diffusers(), absolute(ours, theirs)),
        ("images of latents", diffusers(), absolute(setup.encoders.autoencoder.decode(ours), decoded)),
    ]


def loss_rows(setup: Setup, args: argparse.Namespace) -> list[tuple[float, float, float]]:
    """(t, our loss, diffusers' loss) of the images, with the same noise."""
    world, count = init_distributed(), 8

    def encode(batch: Batch) -> tuple[Tensor, Tensor, Any]:
        drop = torch.zeros(len(batch.draws), dtype=torch.bool)
        encoded = setup.encoders.encode(batch.images, batch.tokens, drop, drop)
        return batch.draws.to(setup.device), batch.valid.to(setup.device), encoded

    def loss(predict: Predict) -> list[float]:
        return validation_loss(
            batches(setup, args),
            encode,
            lambda x, t, txt, vec: predict(x, t, txt, vec, setup.guidance(len(x))),
            batch_size=8,
            timesteps=count,
            seed=SEED,
            group=DataGroup(0, 1, True, world),
            dtype=torch.float32,
            bad_samples=BadSamples(Path(tempfile.gettempdir())),
        )

    times = [(i + 0.5) / count for i in range(count)]
    return list(zip(times, loss(setup.ours), loss(setup.theirs), strict=True))


def pictures(setup: Setup, args: argparse.Namespace) -> tuple[Any, Row]:
    """Our pictures in the upper row, those of diffusers' pipeline and autoencoder in the lower one."""
    import diffusers as library

    steps, guidance, cfg_scale = scales(setup.config.model.flavor)
    steps = args.steps or steps
    guidance = (guidance or setup.config.flow.guidance) if setup.ours.config.guidance_embed else None
    side = setup.config.training.img_size
    requests = [
        Request(p, side, side, steps, guidance, cfg_scale, SEED + i) for i, p in enumerate(args.prompts)
    ]
    known = features(setup, ["", *args.prompts])
    mu = sampler_mu(setup.config.model.flavor)
    latents = denoise(requests, known, setup.ours, FLUX1, mu, setup.device, torch.float32)
    ours = setup.encoders.decode(latents).cpu()

    scheduler = library.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=mu is not None,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = library.FluxPipeline(transformer=setup.transformer, vae=setup.vae, scheduler=scheduler, **absent)
    pipe.set_progress_bar_config(disable=True)
    shape = (16, side // 8, side // 8)
    zero = torch.zeros(1, dtype=torch.int64, device=setup.device)
    noise = torch.cat([rng.normal(r.seed, rng.Purpose.PICTURE, zero, shape) for r in requests])
    count = len(requests)
    theirs = pipe(
        prompt_embeds=torch.stack([known[p].txt for p in args.prompts]).to(setup.dtype),
        pooled_prompt_embeds=torch.stack([known[p].vec for p in args.prompts]).to(setup.dtype),
        negative_prompt_embeds=known[""].txt.expand(count, -1, -1).to(setup.dtype),
        negative_pooled_prompt_embeds=known[""].vec.expand(count, -1).to(setup.dtype),
        true_cfg_scale=cfg_scale,
        guidance_scale=guidance or 0.0,
        latents=FLUX1.pack(noise).to(setup.dtype),
        height=side,
        width=side,
        num_inference_steps=steps,
        output_type="latent",
    ).images
    theirs = decoded(setup.vae, FLUX1.unpack(theirs, *shape[1:]).float()).cpu()
    levels = (ours.int() - theirs.int()).abs()
    captions = [f"{p} ({who})" for who in ("ours", "diffusers") for p in args.prompts]
    sheet = grid([*ours, *theirs], captions, columns=count)
    what = f"{count} pictures after {steps} steps (levels of 255)"
    return sheet, (what, f"{diffusers()} FluxPipeline", f"{levels.max()}, mean {levels.float().mean():.2g}")


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """uint8 images [B, 3, H, W] that diffusers' autoencoder makes of normalised latents [B, 16, h, w]."""
    image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def page(
    args: argparse.Namespace,
    setup: Setup,
    rows: list[Row],
    losses: list[tuple[float, float, float]],
    golden: list[Row],
) -> str:
    command = shlex.join(["python", "benchmarks/parity.py", *sys.argv[1:]])
    where = torch.cuda.get_device_name() if setup.device.type == "cuda" else f"CPU ({platform.machine()})"
    lines = [
        "# Parity",
        "",
        f"Written by `{command}`:",
        f"{setup.config.model.flavor} in {args.dtype}, torch {version('torch')} on {where}, {date.today()}.",
        "Any weights will do: a run's, Black Forest Labs' or diffusers'.",
        "",
        "## Against diffusers, with these weights",
        "diffusers opens what `flux-trainer convert` writes, with no missing and no unexpected key.",
        "",
        *table(rows),
        "",
        f"Loss on {args.samples} images, same noise:",
        "",
        "| t | ours | diffusers | difference |",
        "|---|---|---|---|",
        *(f"| {t:.4f} | {a:.6f} | {b:.6f} | {abs(a - b):.1e} |" for t, a, b in losses),
        "",
        "![the same prompts and noise, drawn by both](parity.png)",
        "",
        "## Against Black Forest Labs' code, on the golden files",
        "Small models with random weights in every parameter, in float32 (`tests/golden/README.md`).",
        "",
        *table(golden),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> list[str]:
    return [
        "| what | reference | largest difference |",
        "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in rows),
    ]


if __name__ == "__main__":
    main()
