"""What 8-bit linears, and what is stored in bfloat16, cost in loss: the same run in each precision.

    python benchmarks/quantize.py train_configs/emoji_tiny.toml --out docs/low_precision

Rounding is emulated (quantize.emulate), so any machine will do; `--device-rounding` is for one that
multiplies in 8 bits. Writes `curves.png`, the losses over the steps, and `report.json`, the figures; prints a
table. Runs that `--runs` holds are not repeated. Further settings (`--training.steps=40`) hold for all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUNS: dict[str, list[str]] = {
    "bfloat16": [],
    "float8": ["--quantize.linears=float8"],
    "float8_rowwise": ["--quantize.linears=float8_rowwise"],
    "mxfp8": ["--quantize.linears=mxfp8"],
    "bfloat16 moments": ["--optimizer.state_dtype=bfloat16"],
    "bfloat16 moments and weights": ["--optimizer.state_dtype=bfloat16", "--training.dtype=bfloat16"],
}
COMMON = [
    "--metrics.log_freq=1",
    "--metrics.no-enable_tensorboard",
    "--checkpoint.no-enable",
    "--validation.prompts=",
    "--quantize.emulate",
]
TAIL = 20  # steps whose mean training loss is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("outputs/quantize"))
    parser.add_argument("--only", default=",".join(RUNS), help="names of runs, with commas")
    parser.add_argument(
        "--device-rounding", action="store_true", help="no emulation: the device multiplies in 8 bits"
    )
    args, overrides = parser.parse_known_args()
    common = [word for word in COMMON if not (args.device_rounding and word == "--quantize.emulate")]
    lines: dict[str, list[dict[str, Any]]] = {}
    for name in args.only.split(","):
        folder = args.runs / name.replace(" ", "-")
        metrics = folder / "metrics.jsonl"
        if not (folder / "done").exists():
            flags = [*common, *RUNS[name], f"--job.dump_folder={folder}", *overrides]
            command = [sys.executable, "-m", "flux_trainer.train", "--job.config_file", args.config, *flags]
            metrics.unlink(missing_ok=True)
            subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            (folder / "done").touch()
        lines[name] = [json.loads(line) for line in metrics.read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {name: summary(run) for name, run in lines.items()}
    (args.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    for name, figure in figures.items():
        print(f"{name:<32}" + "".join(f"{value:>12.4f}" for value in figure.values()))
    plot(lines, args.out / "curves.png")


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Losses at the end of a run."""
    losses = column(lines, "loss")
    return {
        "training_loss": sum(losses[-TAIL:]) / len(losses[-TAIL:]),
        "validation_loss": column(lines, "validation_loss")[-1],
        "ema_validation_loss": column(lines, "ema_validation_loss")[-1],
    }


def column(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines if line.get(key) is not None]


def plot(lines: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Above, each run's training loss as a mean over neighbouring steps; below, its ratio to bfloat16's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    reference = smooth(column(lines["bfloat16"], "loss"))
    for name, run in lines.items():
        losses = smooth(column(run, "loss"))
        steps = range(len(losses))
        style = {"color": "black"} if name == "bfloat16" else {"linewidth": 1}
        upper.plot(steps, losses, label=name, **style)
        lower.plot(steps, [a / b for a, b in zip(losses, reference, strict=True)], **style)
    upper.set(ylabel="training loss, mean over 10 steps")
    lower.set(xlabel="step", ylabel="ratio to bfloat16")
    upper.legend(fontsize=8)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def smooth(losses: list[float], window: int = 10) -> list[float]:
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


if __name__ == "__main__":
    main()
