"""What a run on the embedded emoji has learned: figures and pictures, from its newest checkpoint.

    python benchmarks/emoji_report.py train_configs/emoji.toml --out docs/emoji

Writes `report.json` (losses with the right and with exchanged captions, on training and held-out samples),
`seen.png` and `unseen.png` (drawn from captions of either split, beside the nearest training image),
`curves.png` (losses over the samples seen) and prints the figures. The weights are the averaged ones (EMA).
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.load import load_config
from flux_trainer.config.schema import Source
from flux_trainer.data.loader import ValidationLoader
from flux_trainer.data.samples import Batch, ValidationSamples
from flux_trainer.flux import FluxTrainer
from flux_trainer.metrics.pictures import grid

# Fixed in advance, so that nobody picks the best: every n-th line of each split.
PICTURES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=92, help="of each split, for the losses")
    args, overrides = parser.parse_known_args()  # what is left are settings: --section.key=value
    args.out.mkdir(parents=True, exist_ok=True)

    config = load_config(["--job.config_file", args.config, "--compile.no-enable", *overrides])
    run = Path(config.job.dump_folder)
    with tempfile.TemporaryDirectory() as scratch:  # the run's own folder stays as it is
        trainer = FluxTrainer(
            config.model_copy(
                update={
                    "job": config.job.model_copy(update={"dump_folder": scratch}),
                    "checkpoint": config.checkpoint.model_copy(update={"enable": False}),
                }
            )
        )
        checkpoints = CheckpointManager(config.checkpoint, run, trainer.world)
        state = checkpoints.resume(trainer.tensors(), trainer.identity())
        if state is None:
            raise SystemExit(f"{run} holds no checkpoint: train first")
        report(trainer, state, run, args.out, args.samples)
        trainer.close()


def report(trainer: FluxTrainer, state: dict[str, Any], run: Path, out: Path, samples: int) -> None:
    config = trainer.config
    splits = {"train": config.data.sources, "held_out": config.validation.sources}
    with trainer.averaged_weights() if trainer.ema else nullcontext():
        figures = {"step": state["step"], "samples_seen": state["samples_seen"]}
        for name, sources in splits.items():
            batches = list(loader(trainer, sources, samples))
            figures[f"{name}_loss"] = loss(trainer, batches)
            figures[f"{name}_loss_exchanged_captions"] = loss(trainer, exchange(batches))
        for name, sources in zip(("seen", "unseen"), splits.values(), strict=True):
            draw(trainer, sources).save(out / f"{name}.png")
    curves(run / "metrics.jsonl", out / "curves.png")
    (out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def loader(trainer: FluxTrainer, sources: list[Source], count: int) -> ValidationLoader:
    """`count` samples at even distances through the sources."""
    config = trainer.config
    plain = [source.model_copy(update={"weight": None, "repeats": 1}) for source in sources]
    samples = ValidationSamples(plain, count=count, image_size=config.training.img_size, data=config.data)
    return ValidationLoader(
        config.data.model_copy(update={"num_workers": 0}),
        samples,
        tokenize=trainer.encoders.text.tokenizers.tokenize,
        batch_size=config.validation.local_batch_size,
        rank=0,
        world_size=1,
    )


def loss(trainer: FluxTrainer, batches: Iterable[Batch]) -> float:
    losses = trainer.losses(batches)
    return sum(losses) / len(losses)


def exchange(batches: list[Batch]) -> list[Batch]:
    """The same images and noise, each with the caption of another sample half way through the set."""
    sizes = [len(batch.draws) for batch in batches]
    valid = torch.cat([batch.valid for batch in batches])
    count = int(valid.sum())
    order = torch.arange(len(valid))
    order[:count] = order[:count].roll(count // 2)
    tokens = {
        name: torch.cat([batch.tokens[name] for batch in batches])[order].split(sizes)
        for name in batches[0].tokens
    }
    return [
        replace(batch, tokens={name: ids[i] for name, ids in tokens.items()})
        for i, batch in enumerate(batches)
    ]


def draw(trainer: FluxTrainer, sources: list[Source]) -> Image.Image:
    """Pairs of a drawn picture and the training image nearest to it, with their captions."""
    chosen = [
        caption for batch in loader(trainer, sources, PICTURES) for caption in batch.captions if caption
    ]
    drawn = trainer.draw(chosen)
    everything = loader(trainer, trainer.config.data.sources, -1)
    parts = [(batch.images[batch.valid], batch.captions) for batch in everything]
    images = torch.cat([images for images, _ in parts])  # [N, 3, H, W]
    names = [caption for _, captions in parts for caption in captions if caption]
    nearest = [nearest_image(picture, images) for picture in drawn]
    sheet = torch.stack(
        [picture for i, own in zip(nearest, drawn, strict=True) for picture in (own, images[i])]
    )
    captions = [
        text
        for i, prompt in zip(nearest, chosen, strict=True)
        for text in (prompt, f"nearest in training: {names[i]}")
    ]
    return grid(sheet, captions, columns=8)


def nearest_image(picture: Tensor, images: Tensor) -> int:
    """Number of the image [3, H, W] among images [N, 3, H, W] with the least mean squared difference."""
    return int((images.float() - picture.float()).square().flatten(1).mean(1).argmin())


def curves(metrics: Path, out: Path) -> None:
    """Training loss (mean of neighbouring lines) and validation losses over the samples seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [(line["samples_seen"], line["loss"]) for line in lines if line.get("loss") is not None]
    per_step = training[-1][0] / max(line["step"] for line in lines)
    window = max(1, len(training) // 50)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    groups = [training[i : i + window] for i in range(0, len(training), window)]
    axes.plot(
        [group[-1][0] for group in groups],
        [sum(value for _, value in group) / len(group) for group in groups],
        label="training",
        color="0.7",
    )
    for key, label in (
        ("validation_loss", "held out"),
        ("ema_validation_loss", "held out, averaged weights"),
    ):
        points = [(line["step"] * per_step, line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel="samples seen", ylabel="loss (mean squared error of the velocity)", ylim=(None, 1.5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
