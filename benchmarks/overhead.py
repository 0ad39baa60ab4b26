"""What the trainer adds to a step: `FluxTrainer.train_step` against a bare loop, on the same model and batch.

    python benchmarks/overhead.py [--rounds 15] [--dtype float32]

The bare loop is forward, backward, clipping, optimizer. The trainer's step is everything it does between two
batches: accumulation, clipping, guard, schedule, optimizer, figures (default logging). Both get the batch as
it leaves the encoders, whose cost depends on which ones a user trains with. The two take turns in one
process, so that a change in the machine's speed meets both; the ratio is that of the medians.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from flux_trainer.config.load import load_config
from flux_trainer.flux import FluxTrainer, MicroBatch
from flux_trainer.models import registry

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        trainer = FluxTrainer(
            load_config(
                [
                    "--job.config_file",
                    str(ROOT / "train_configs/flux_debug.toml"),
                    f"--job.dump_folder={folder}",
                    f"--training.mixed_precision_param={args.dtype}",
                    "--data.num_workers=0",
                    "--metrics.log_freq=10",
                    "--training.steps=100000",
                ]
            )
        )
        with closing(trainer.build_loader(0)) as loader:
            batch = next(loader)
        (ready,) = trainer.micro_batches(batch)
        other = bare_model(trainer)
        optimizer = torch.optim.AdamW(other.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        times: dict[str, list[float]] = {"trainer": [], "bare": []}
        for round_ in range(args.rounds + 2):
            for name in ("trainer", "bare") if round_ % 2 else ("bare", "trainer"):
                synchronize(trainer.device)
                start = time.perf_counter()
                if name == "trainer":
                    trainer.train_step([ready])
                else:
                    bare_step(trainer, ready, other, optimizer, args.dtype)
                synchronize(trainer.device)
                if round_ >= 2:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        where = f"{args.dtype}, {trainer.device}, torch {torch.__version__}"
        print(f"flux-debug, 1 x (256 + 256) tokens, {where}")
        for name, values in times.items():
            print(f"{name:8} median {medians[name]:.4f} s  ({min(values):.4f} to {max(values):.4f})")
        print(f"trainer / bare loop = {medians['trainer'] / medians['bare']:.4f}")
        trainer.close()


def bare_model(trainer: FluxTrainer) -> nn.Module:
    """A plain copy of the trainer's model, in float32."""
    model = registry.build("flux1", trainer.config.model.flavor).to(trainer.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = trainer.parameters[name]
            parameter.copy_(value.full_tensor() if hasattr(value, "full_tensor") else value)
    return model


def bare_step(
    trainer: FluxTrainer, batch: MicroBatch, model: nn.Module, optimizer: torch.optim.Optimizer, dtype: str
) -> None:
    """Forward, backward, clip, optimizer; autocast where the trainer computes in bfloat16."""
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = trainer.loss(model(**trainer.inputs(batch)), batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), trainer.config.training.max_norm)
    optimizer.step()
    optimizer.zero_grad()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
