"""Images a second of our trainer and of torchtitan's: whole steps, with data and encoders in the loop.

    python benchmarks/end_to_end.py [--rounds 7] [--rows fp32 bf16 bf16-compiled] [--device cpu]

Both train on the same pictures and captions with the same weights of transformer, autoencoder, T5 and CLIP,
the same dtypes, threads and optimizer: `FluxTrainer.train_step` of this project and of torchtitan, each with
its own data loader (`torchtitan_trainer.py` says what that takes). Before anything is timed, both get the
same batch, noise and t: tokens, images, features, latents, the loss and the gradient of every parameter are
compared, and a difference above TOLERANCE ends the run. Then they take turns in one process, so that a change
in the machine's speed meets both; ratios are those of the medians. Every row has a process of its own.

torchtitan wraps its model in FSDP on a single device, too; it is timed as it is and without that. Writes
end_to_end.md into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from peers import KEEP_MEMORY, TOLERANCE, cpu, error, versions
from PIL import Image
from step_times import DATA, ENCODERS, MODEL, REST, Contestant, Times, take_turns
from torch import Tensor
from torchtitan_trainer import HOW_TO_INSTALL, TorchTitan, installed

from flux_trainer.config.load import load_config
from flux_trainer.data.samples import Batch
from flux_trainer.flow import rng
from flux_trainer.flow.path import interpolate
from flux_trainer.flow.rng import Purpose
from flux_trainer.flux import FluxTrainer

ROOT = Path(__file__).parent.parent
OURS, TITAN, BARE = "flux_trainer", "torchtitan", "torchtitan without FSDP"
SAMPLES = 64
ROWS = {"fp32": ("float32", False), "bf16": ("bfloat16", False), "bf16-compiled": ("bfloat16", True)}
"""Name -> dtype of the transformer's and the text encoders' arithmetic, and whether blocks are compiled."""


Result = tuple[dict[str, Times], dict[str, float]]
"""Times of each contestant; how far apart they were before."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--peers", nargs="+", choices=[TITAN, BARE], default=[TITAN, BARE])
    parser.add_argument("--config", default="train_configs/flux_debug.toml", help="flavor and encoders")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: a GPU if any")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out = args.out.resolve()
    os.chdir(ROOT)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not installed():
        print(HOW_TO_INSTALL, file=sys.stderr)
        args.peers = [OURS]

    load_before, found = os.getloadavg(), {}
    for row in args.rows:
        for peer in args.peers:
            print(f"{row}, {peer}", flush=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found[row, peer] = pool.submit(measure_row, args, row, peer).result()
            print(*speed_lines({(row, peer): found[row, peer]}, args.batch), sep="\n", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "end_to_end.md").write_text(page(args, found, load_before), encoding="utf-8")


def measure_row(args: argparse.Namespace, row: str, peer: str) -> Result:
    """Compare ours with a peer (OURS: nobody), then time both."""
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer, samples = our_trainer(args, row, folder)
        errors: dict[str, float] = {}
        with closing(trainer.build_loader(0)) as loader:
            contestants = [ours(trainer, loader)]
            if peer != OURS:
                titan = TorchTitan(trainer, samples, fsdp=peer == TITAN)
                errors = compare(trainer, titan, next(loader))
                contestants.append(theirs(titan, peer))
            times = take_turns(contestants, args.rounds, trainer.device)
        trainer.close()
    return times, errors


def our_trainer(args: argparse.Namespace, row: str, folder: Path) -> tuple[FluxTrainer, dict[str, Path]]:
    """Our trainer with random weights, and the image file of each caption."""
    dtype, compiled = ROWS[row]
    flags = [
        f"--job.config_file={args.config}",
        f"--job.dump_folder={folder / 'ours'}",
        f"--encoder.dtype={dtype}",
        "--encoder.autoencoder_dtype=float32",
        f"--training.mixed_precision_param={dtype}",
        f"--training.local_batch_size={args.batch}",
        "--training.classifier_free_guidance_prob=0",
        "--training.steps=1000000",
        "--flow.timestep_sampling=uniform",  # as torchtitan draws t, which costs nothing
        "--optimizer.decay_all=true",
        "--lr_scheduler.warmup_steps=1",
        "--activation_checkpoint.mode=none",
        f"--compile.enable={compiled}".lower(),
        "--metrics.log_freq=10",
        "--validation.enable=false",
        "--checkpoint.enable=false",
        "--ema.enable=false",
        "--data.sources.0.type=jsonl",
        f"--data.sources.0.path={folder / 'train.jsonl'}",
        "--data.num_workers=0",
    ]
    samples = write_samples(folder, load_config(flags).training.img_size)
    trainer = FluxTrainer(load_config(flags))
    generator = torch.Generator(trainer.device).manual_seed(0)
    with torch.no_grad():
        for name, p in trainer.parameters.items():
            # Modulations too, which start at zero: otherwise most gradients would be.
            p.normal_(1.0 if name.endswith(".scale") else 0.0, 0.02, generator=generator)
    return trainer, samples


def write_samples(folder: Path, size: int) -> dict[str, Path]:
    """The embedded emoji as square images of `size` pixels, which nobody has to resize: caption -> file."""
    source = ROOT / "assets/emoji"
    lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()[:SAMPLES]
    samples = {}
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i, line in enumerate(map(json.loads, lines)):
            path = folder / f"{i}.png"
            with Image.open(source / line["file_name"]) as image:
                image.convert("RGB").resize((size, size)).save(path)
            samples[line["text"]] = path
            print(json.dumps({"file_name": path.name, "text": line["text"]}), file=file)
    assert len(samples) == SAMPLES, "captions name the samples"
    return samples


def ours(trainer: FluxTrainer, loader: Iterator[Batch]) -> Contestant:
    parts = [(ENCODERS, trainer, "encode"), (MODEL, trainer, "forward_backward")]

    def train(batch: Batch) -> None:
        trainer.train_step(trainer.micro_batches(batch))

    return Contestant(OURS, lambda: next(loader), train, parts)


def theirs(titan: TorchTitan, name: str) -> Contestant:
    parts = [(ENCODERS, titan.module, "preprocess_data"), (MODEL, titan.trainer, "forward_backward_step")]
    return Contestant(name, lambda: next(titan.batches), titan.train, parts)


def compare(trainer: FluxTrainer, titan: TorchTitan, batch: Batch) -> dict[str, float]:
    """|ours - theirs| / |theirs| of what both make of one batch; exit where that is too much."""
    seed, shape, draws = trainer.config.debug.seed, trainer.latent_shape, batch.draws.to(trainer.device)
    posterior = rng.normal(seed, Purpose.LATENT, draws, shape, trainer.encoders.dtype)
    noise = rng.normal(seed, Purpose.NOISE, draws, shape, trainer.wide)
    t = torch.full_like(draws, 0.5, dtype=torch.float32)  # exact in bfloat16, to which FSDP rounds it
    _, _, encoded = trainer.encode(batch, len(draws), sample=True)
    x_t = interpolate(encoded.latents.to(trainer.wide), noise, t)
    loss = trainer.forward_backward([replace(trainer.prepare(draws, encoded), t=t, x_t=x_t)])
    gradients = {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}
    trainer.optimizer.zero_grad()
    assert encoded.vec is not None
    here: dict[str, Tensor] = {
        "T5's tokens": batch.tokens["t5"],
        "CLIP's tokens": batch.tokens["clip"],
        "images": batch.images / 127.5 - 1.0,
        "T5": encoded.txt,
        "CLIP": encoded.vec,
        "latents": encoded.latents,
        "loss": loss,
    }
    there, their_gradients = titan.forward_backward(titan.batch(batch.captions), posterior, noise, t)
    assert here.keys() == there.keys()
    errors = {name: error(here[name], there[name]) for name in here}
    of_gradients = {name: error(gradients[name], g) for name, g in their_gradients.items()}
    assert of_gradients.keys() == gradients.keys()
    errors["gradients (median)"] = statistics.median(of_gradients.values())
    errors["gradients (largest)"] = max(of_gradients.values())
    print("  " + ", ".join(f"{name} {e:.1e}" for name, e in errors.items()), flush=True)
    worst, tolerance = max(errors, key=errors.__getitem__), TOLERANCE[trainer.compute_dtype]
    if not errors[worst] < tolerance:
        sys.exit(
            f"torchtitan computes something else ({worst}): the tolerance is {tolerance}. Nothing was timed."
        )
    return errors


def speed_lines(found: Mapping[tuple[str, str], Result], batch: int) -> list[str]:
    lines = []
    for (row, _), (times, _) in found.items():
        ours = statistics.median(times[OURS].steps)
        for name, theirs in times.items():
            steps = theirs.steps
            median = statistics.median(steps)
            ratio = "" if name == OURS else f"{median / ours:.2f}"
            spread = f"{min(steps):.3f} to {max(steps):.3f}"
            lines.append(f"| {row} | {name} | {batch / median:.3f} | {median:.3f} s | {spread} | {ratio} |")
    return lines


def part_lines(found: Mapping[tuple[str, str], Result]) -> list[str]:
    lines = []
    for (row, _), (times, _) in found.items():
        for name, theirs in times.items():
            medians = [statistics.median(theirs.parts[part]) for part in (DATA, ENCODERS, MODEL, REST)]
            lines.append(f"| {row} | {name} | " + " | ".join(f"{m:.3f} s" for m in medians) + " |")
    return lines


def page(
    args: argparse.Namespace,
    found: Mapping[tuple[str, str], Result],
    load_before: tuple[float, float, float],
) -> str:
    command = shlex.join(["python", "benchmarks/end_to_end.py", *sys.argv[1:]])
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads of {cpu()}"
    config = load_config([f"--job.config_file={args.config}"])
    names = [*dict.fromkeys(name for _, errors in found.values() for name in errors)]
    errors = [
        f"| {row} | {peer} | " + " | ".join(f"{errors[name]:.0e}" for name in names) + " |"
        for (row, peer), (_, errors) in found.items()
        if errors
    ]
    lines = [
        "# Whole training steps of our trainer and of torchtitan's",
        "",
        f"Written by `{command}` on {date.today()}:",
        f"{config.model.flavor} on images of {config.training.img_size} px with "
        f"{config.encoder.max_t5_encoding_len} T5 tokens, batch {args.batch},",
        f"{device},",
        f"{versions()}, transformers {version('transformers')}.",
        f"Medians of {args.rounds} interleaved steps.",
        f"Load average {load_before[0]:.1f} over a minute before, "
        f"{os.getloadavg()[2]:.1f} over 15 minutes after; this run adds at most {args.threads}.",
        *([] if args.device == "cuda" else ["On a GPU this has not been measured."]),
        "",
        "A step loads and decodes images, tokenizes, encodes with T5, CLIP and autoencoder, adds noise, goes",
        "forward and backward, clips, and updates with AdamW. The ratio is ours / theirs in images a second.",
        "",
        "| row | who | images/s | median of a step | least to most | ratio |",
        "|---|---|---|---|---|---|",
        *speed_lines(found, args.batch),
        "",
        "## Where the seconds of a step go",
        "Medians of each part. The autoencoder computes in float32 in every row, the text encoders in the",
        "row's dtype.",
        "",
        f"| row | who | {DATA} | {ENCODERS} | {MODEL} | {REST} |",
        "|---|---|---|---|---|---|",
        *part_lines(found),
        "",
    ]
    if errors:
        wide, narrow = TOLERANCE[torch.float32], TOLERANCE[torch.bfloat16]
        lines += [
            "## What both compute from the same batch, noise and t",
            "Compared before anything was timed, as |ours - theirs| / |theirs| over the whole tensor; the",
            f"tolerance is {wide} in float32 and {narrow} in bfloat16.",
            "",
            "| row | with | " + " | ".join(names) + " |",
            "|---" * (2 + len(names)) + "|",
            *errors,
            "",
            *CONDITIONS,
        ]
    return "\n".join(lines)


CONDITIONS = [
    "## Conditions",
    "torchtitan's own `FluxTrainer.train_step` runs, with its data loader, tokenizers and encoder classes.",
    "For this comparison",
    "- its debug settings have our sizes, paths and optimizer; neither side checkpoints activations,",
    "  validates or saves, and both print figures every 10 steps and load data in the training process;",
    "- the pictures are registered as one of its data sets, and go through its COCO processor;",
    "- its RMSNorm has FLUX's epsilon, 1e-6 in place of 1e-5;",
    "- CLIP is put into the row's dtype, where it would stay in float32 on a single device;",
    "- on a CPU it is told that this is its device, and its memory monitor, which asks an accelerator, is",
    "  replaced by one that says 0;",
    "- ours decays all weights and draws t uniformly, as it does, which is not our default.",
    "",
    "It wraps the model in FSDP on one device too, where there is nobody to share with: that is how it gets",
    "mixed precision. In the rows `without FSDP` this wrapping is left out by hand, of the transformer and",
    "of T5, and bfloat16 comes from autocast.",
    "",
]


if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads them as the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_MEMORY, **os.environ})
    main()
