"""How far this code is from diffusers and from Black Forest Labs': figures and pictures, as a page.

    python benchmarks/parity.py WEIGHTS... [--ema] [--images FOLDER] [--prompts TEXT ...] [--out docs]

WEIGHTS: runs' folders, checkpoints, files of Black Forest Labs or diffusers folders, as `flux-trainer
generate` takes them, of FLUX.1 or FLUX.2. diffusers gets the weights by `flux-trainer convert`, and opens
them itself. Both then compute velocities and losses of the images and draw the prompts, from the same noise
and text features. Writes parity.md and parity.png into --out. Flags that follow are settings, such as those
of [encoder].
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
from typing import TYPE_CHECKING, Any

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
from flux_trainer.encoders.choose import kind_of
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.hub.load import load_weights
from flux_trainer.metrics.pictures import grid
from flux_trainer.models import registry
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.mesh import DataGroup
from flux_trainer.runtime.dist import init_distributed
from flux_trainer.sample import denoise, sampler_mu
from flux_trainer.validate import validation_loss
from flux_trainer.velocity import Velocity

if TYPE_CHECKING:
    from counterpart import Counterpart

IMAGES = Path(__file__).parents[1] / "assets" / "emoji" / "validation.jsonl"
PROMPTS = ["red apple", "grinning face", "dog face", "sunflower"]
SEED = 0

Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass
class Setup:
    """Both implementations with the same weights, on one device, in one dtype."""

    config: JobConfig
    weights: str
    """For people: what was loaded, and from where."""
    encoders: Encoders
    ours: Velocity
    theirs: "Counterpart"
    device: torch.device

    def guidance(self, count: int) -> Tensor | None:
        """As in training."""
        if not self.ours.config.guidance_embed:
            return None
        return torch.full((count,), self.config.flow.guidance, device=self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+")
    parser.add_argument("--ema", action="store_true", help="the moving average of a run's weights")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder or .jsonl, images with captions")
    parser.add_argument("--samples", type=int, default=32, help="of the images, for the loss")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--steps", type=int, help="Euler steps; default: as suits the flavor")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args, flags = parser.parse_known_args()

    sections, images, captions = [], [], []
    for weights in args.weights:
        flavor, text, drawn = compare(weights, args, flags)
        sections += text
        images += drawn
        captions += [f"{p} ({flavor}, {who})" for who in ("ours", "diffusers") for p in args.prompts]
    args.out.mkdir(parents=True, exist_ok=True)
    grid(images, captions, columns=len(args.prompts)).save(args.out / "parity.png")
    written = page(args, sections, golden_rows())
    (args.out / "parity.md").write_text(written, encoding="utf-8")
    print(written)


@torch.no_grad()
def compare(weights: str, args: argparse.Namespace, flags: list[str]) -> tuple[str, list[str], list[Tensor]]:
    """Flavor, the page's lines and the pictures of one WEIGHTS."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if not args.images.exists():
                raise FileNotFoundError(f"--images {args.images}: there is no such file or folder")
            setup = prepare(weights, args, flags, Path(scratch))
        except (ValueError, OSError, CheckpointError) as error:
            sys.exit(str(error))
        rows = [*forward_rows(setup), *autoencoder_rows(setup, batches(setup, args))]
        losses = loss_rows(setup, args)
        drawn, row = pictures(setup, args)
    return setup.config.model.flavor, section(setup, args, [*rows, row], losses), drawn


def prepare(name: str, args: argparse.Namespace, flags: list[str], scratch: Path) -> Setup:
    """Load the weights twice: natively, and as diffusers opens what was converted for it."""
    from counterpart import COUNTERPARTS

    weights = find_weights(name)
    # The encoders are the same for both: their dtype only has to be wide enough.
    widths = [f"--encoder.{key}=float32" for key in ("dtype", "autoencoder_dtype")]
    config, _, _ = load([*flags, *widths], weights.settings)
    device = init_distributed().device
    dtype: torch.dtype = getattr(torch, args.dtype)
    shape = registry.FLAVORS[config.model.flavor]
    model = registry.build(config.model.name, config.model.flavor).to(device, dtype).requires_grad_(False)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    loaded = load_weights(weights.path, parameters, config=shape, ema=args.ema)
    print(loaded, file=sys.stderr)
    autoencoder = Path(config.encoder.autoencoder_path)
    theirs = COUNTERPARTS[shape.family](weights.path, autoencoder, scratch, device, dtype, args.ema)
    encoders = Encoders(
        config.encoder, device, config.debug.seed, kind=kind_of(shape), context_in_dim=shape.context_in_dim
    )
    velocity = Velocity(Parallel([model], {}, None, None), shape, device)
    return Setup(config, loaded, encoders, velocity, theirs, device)


def features(setup: Setup, texts: list[str]) -> dict[str, TextFeatures]:
    encoded = setup.encoders.text.encode(setup.encoders.text.tokenize(texts))
    vecs = [None] * len(texts) if encoded.vec is None else encoded.vec
    return {text: TextFeatures(encoded.txt[i], vecs[i]) for i, text in enumerate(texts)}


def forward_rows(setup: Setup) -> list[Row]:
    """The velocity at random latents of several sizes and times."""
    side = setup.config.training.img_size
    text = setup.encoders.text.encode(setup.encoders.text.tokenize(["red apple", ""]))
    rows = []
    for height, width in ((side, side), (side, side // 2)):
        draws = torch.arange(2, device=setup.device)
        x = rng.normal(SEED, rng.Purpose.PICTURE, draws, setup.ours.space.shape(height, width))
        t = torch.tensor([0.9, 0.3], device=setup.device)
        given = (x, t, text.txt, text.vec, setup.guidance(2))
        difference = absolute(setup.ours(*given).float(), setup.theirs.velocity(*given).float())
        rows.append((f"velocity, {width} x {height} px, t = 0.9 and 0.3", diffusers(), difference))
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
        data=config.data,
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
    images = batches[0].images
    latents = setup.encoders.encode_images(images)
    theirs = setup.theirs.encode(images.to(setup.device).float() / 127.5 - 1)
    decoded = setup.encoders.autoencoder.decode(latents)
    return [
        ("latents of images", diffusers(), absolute(latents, theirs)),
        ("images of latents", diffusers(), absolute(decoded, setup.theirs.decode(latents))),
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
            lambda x, t, sample: predict(x, t, sample.txt, sample.vec, setup.guidance(len(x))),
            batch_size=8,
            timesteps=count,
            seed=SEED,
            group=DataGroup(0, 1, True, world),
            dtype=torch.float32,
            bad_samples=BadSamples(Path(tempfile.gettempdir())),
        )

    times = [(i + 0.5) / count for i in range(count)]
    return list(zip(times, loss(setup.ours), loss(setup.theirs.velocity), strict=True))


def pictures(setup: Setup, args: argparse.Namespace) -> tuple[list[Tensor], Row]:
    """Our pictures, then those of diffusers' pipeline and autoencoder."""
    steps, guidance, cfg_scale = scales(setup.config.model.flavor)
    steps = args.steps or steps
    guidance = (guidance or setup.config.flow.guidance) if setup.ours.config.guidance_embed else None
    side, space = setup.config.training.img_size, setup.ours.space
    requests = [
        Request(p, side, side, steps, guidance, cfg_scale, SEED + i) for i, p in enumerate(args.prompts)
    ]
    known = features(setup, ["", *args.prompts])
    mu = sampler_mu(setup.config.model.flavor)
    latents = denoise(requests, known, setup.ours, space, mu, setup.device, torch.float32)
    ours = setup.encoders.decode(latents).cpu()

    zero = torch.zeros(1, dtype=torch.int64, device=setup.device)
    noise = [rng.normal(r.seed, rng.Purpose.PICTURE, zero, space.shape(side, side)) for r in requests]
    latents = setup.theirs.draw(requests, known, torch.cat(noise), shifted=mu is not None)
    theirs = to_bytes(setup.theirs.decode(latents)).cpu()
    levels = (ours.int() - theirs.int()).abs()
    what = f"{len(requests)} pictures after {steps} steps (levels of 255)"
    pipeline = f"{diffusers()} {setup.theirs.pipeline_class.__name__}"
    return [*ours, *theirs], (what, pipeline, f"{levels.max()}, mean {levels.float().mean():.2g}")


def to_bytes(image: Tensor) -> Tensor:
    """uint8 of an image about [-1, 1]."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def section(
    setup: Setup, args: argparse.Namespace, rows: list[Row], losses: list[tuple[float, float, float]]
) -> list[str]:
    """What is said of one WEIGHTS."""
    return [
        f"## {setup.config.model.flavor} against diffusers",
        f"{setup.weights}.",
        "",
        *table(rows),
        "",
        f"Loss on {args.samples} images, same noise:",
        "",
        "| t | ours | diffusers | difference |",
        "|---|---|---|---|",
        *(f"| {t:.4f} | {a:.6f} | {b:.6f} | {abs(a - b):.1e} |" for t, a, b in losses),
        "",
    ]


def page(args: argparse.Namespace, sections: list[str], golden: list[Row]) -> str:
    command = shlex.join(["python", "benchmarks/parity.py", *sys.argv[1:]])
    device = init_distributed().device
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    lines = [
        "# Parity",
        "",
        f"Written by `{command}`:",
        f"in {args.dtype}, torch {version('torch')} on {where}, {date.today()}.",
        "Any weights will do: a run's, Black Forest Labs' or diffusers'. diffusers opens what",
        "`flux-trainer convert` writes, with no missing and no unexpected key.",
        "",
        *sections,
        "The same prompts and noise, drawn by both:",
        "",
        "![rows of ours above rows of diffusers'](parity.png)",
        "",
        "## Against Black Forest Labs' code, on the golden files",
        "Small models with random weights in every parameter, in float32 (`tests/golden/README.md`).",
        "BFL's code computes the frequencies of timesteps with float32's exp, whose last bits depend on the",
        "machine; at guidance 3.5 one of them turns an angle by 3500 x 2^-24 = 2e-4. Ours are computed in",
        "float64 and rounded once, so that they are the same on all devices, and none is further than 2^-24",
        "from BFL's. Rows use BFL's unless they say otherwise. Rotary tables are computed likewise, as in",
        "diffusers.",
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
