"""Images per second of FLUX on one device: a row for each policy, size and precision that is asked for.

    python benchmarks/throughput.py --flavors flux-dev,flux2-dev [--sizes 512,1024] [--batches 1]
        [--blocks 4+8] [--fit] [--kinds train,frozen,inference] [--compile off,on] [--profile]
        [--policies none,selective:op,attention,full,memory_budget:0.5,attention+offload]
        [--linears none,float8,float8_rowwise] [--out benchmarks/results] [--append] [--SECTION.KEY=VALUE ...]

A flavor at full width is cut to --blocks double + single ones (default: all). A case that runs out of memory
is a row that says so; with --fit it is tried again with half the blocks, until it fits. Weights are stored in
float32 for the kind train, in bfloat16 for frozen and inference (see `one_step.py`), and computed with in
bfloat16. Without gradients nothing is recomputed: inference has one row for all policies.

Further flags are settings of a run and hold for every row (`--optimizer.state_dtype=bfloat16`). Each row is
written to OUT/throughput.md and .json as soon as it is there; --append keeps the runs that are in the latter.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from device_time import peak_memory, profiled, timed
from one_step import KINDS, flops, make

from flux_trainer.adapters.quantize import quantize_linears
from flux_trainer.config.check import check
from flux_trainer.config.load import load_config
from flux_trainer.config.schema import JobConfig
from flux_trainer.metrics.peak import device_peak_flops
from flux_trainer.models import registry
from flux_trainer.models.configs import ModelConfig
from flux_trainer.parallel.arithmetic import tokens
from flux_trainer.runtime.dist import init_distributed

POLICIES = "none,selective:op,attention,full,memory_budget:0.5,attention+offload"
VALUES = {"selective": "selective_ac_option", "memory_budget": "memory_budget"}  # settings beside the mode


@dataclass(frozen=True)
class Case:
    """What a row measures."""

    flavor: str
    size: int
    batch: int
    kind: str
    policy: str
    compile: bool
    linears: str
    double: int
    single: int

    @property
    def model(self) -> ModelConfig:
        return replace(registry.FLAVORS[self.flavor], depth=self.double, depth_single_blocks=self.single)

    def settings(self, text: int, further: list[str]) -> JobConfig:
        """Those of a run that does this, whatever its data.

        Raises:
            ConfigError: they cannot be together.
        """
        policy, *switches = self.policy.split("+")  # mode:value+offload
        mode, _, value = policy.partition(":")
        flags = {
            "model.flavor": self.flavor,
            f"encoder.{self.model.text_length}": text,
            "data.sources.0.type": "synthetic",
            "training.img_size": self.size,
            "training.local_batch_size": self.batch,
            "training.dtype": "float32" if self.kind == "train" else "bfloat16",
            "activation_checkpoint.mode": mode,
            "compile.enable": str(self.compile).lower(),
            "quantize.linears": self.linears,
        }
        flags |= {f"activation_checkpoint.{switch}": "true" for switch in switches}
        if value:
            flags[f"activation_checkpoint.{VALUES.get(mode, mode)}"] = value
        config = load_config([*(f"--{key}={value}" for key, value in flags.items()), *further])
        check(config, 1, files=False)
        return config


def main(argv: list[str]) -> None:
    args, further = arguments(argv)
    world = init_distributed()
    cases = list(asked(args))
    for case in cases:  # what cannot be is refused before anything is measured
        with torch.device("meta"):
            few = replace(case.model, depth=min(1, case.double), depth_single_blocks=min(1, case.single))
            quantize_linears(registry.model_class(few)(few), case.settings(args.text, further).quantize)
    page, data, profiles = (args.out / f"throughput{name}" for name in (".md", ".json", "_profile.txt"))
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.append:
        data.unlink(missing_ok=True)
        profiles.unlink(missing_ok=True)
    runs: list[dict[str, Any]] = json.loads(data.read_text()) if data.exists() else []
    rows: list[dict[str, Any]] = []
    command = f"python benchmarks/throughput.py {shlex.join(argv)}"
    runs.append({**where(world.device), "command": command, "rows": rows})
    for case in cases:
        left: Case | None = case
        while left:
            row, profile = measure(left, args, further, world.device)
            rows.append(row)
            print(line(row), file=sys.stderr)
            data.write_text(json.dumps(runs, indent=1) + "\n")
            page.write_text(text_of(runs))
            if profile:
                with profiles.open("a") as file:
                    file.write(f"{line(row)}\n{profile}\n")
            left = halved(left) if args.fit and row["seconds"] is None else None
    world.close()


def arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The benchmark's own, and a run's settings."""

    def names(words: str) -> list[str]:
        return words.split(",")

    def numbers(words: str) -> list[int]:
        return [int(word) for word in words.split(",")]

    def blocks(words: str) -> tuple[int, int]:
        double, single = words.split("+")
        return int(double), int(single)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--flavors", type=names, default=["flux-dev"])
    parser.add_argument("--sizes", type=numbers, default=[512, 1024], help="pixels along an image's edge")
    parser.add_argument("--batches", type=numbers, default=[1], help="samples of a step")
    parser.add_argument("--text", type=int, default=512, help="text tokens")
    parser.add_argument("--blocks", type=blocks, help="double + single, such as 4+8; default: all")
    parser.add_argument("--fit", action="store_true", help="halve the blocks until they fit")
    parser.add_argument("--kinds", type=names, default=[*KINDS])
    parser.add_argument("--policies", type=names, default=POLICIES.split(","))
    parser.add_argument("--compile", type=names, default=["off", "on"])
    parser.add_argument("--linears", type=names, default=["none"], help="as quantize.linears")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="write throughput_profile.txt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--append", action="store_true", help="keep the runs of an earlier table")
    args, further = parser.parse_known_args(argv)
    for name, known in (
        ("flavors", [*registry.FLAVORS]),
        ("kinds", KINDS),
        ("compile", ["off", "on"]),
    ):
        if unknown := set(getattr(args, name)) - set(known):
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return args, further


def asked(args: argparse.Namespace) -> Iterator[Case]:
    for flavor, size, batch, kind, linears, compiled, policy in product(
        args.flavors, args.sizes, args.batches, args.kinds, args.linears, args.compile, args.policies
    ):
        if kind == "inference" and policy != args.policies[0]:
            continue
        if kind != "inference" and policy.startswith("memory_budget") and compiled == "off":
            continue  # the compiler's
        model = registry.FLAVORS[flavor]
        double, single = args.blocks or (model.depth, model.depth_single_blocks)
        policy = "none" if kind == "inference" else policy
        yield Case(flavor, size, batch, kind, policy, compiled == "on", linears, double, single)


def halved(case: Case) -> Case | None:
    """The same with half the blocks, at least one of each kind that it has; None if that is no fewer."""
    fewer = replace(case, double=(case.double + 1) // 2, single=(case.single + 1) // 2)
    return None if fewer == case else fewer


def measure(
    case: Case, args: argparse.Namespace, further: list[str], device: torch.device
) -> tuple[dict[str, Any], str]:
    """The row of a case, and its profile where one is asked for."""
    config = case.settings(args.text, further)
    seconds = memory = step = None
    profile = ""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        step = make(case.kind, case.model, config, device)
        for _ in range(args.warmup):
            step()
        seconds = timed(step, args.steps, device)
        memory = peak_memory(device)
        profile = profiled(step, device) if args.profile else ""
    except torch.OutOfMemoryError:
        pass
    del step  # blocks refer to themselves, by what replaced their forward: only the collector frees them
    torch._dynamo.reset()
    gc.collect()
    work = case.batch * flops(case.kind, case.model, *tokens(config))
    found = figures(case.batch, work, seconds, device_peak_flops(device))
    return {**asdict(case), "text": args.text, **found, "peak_gib": memory}, profile


def figures(batch: int, work: int, seconds: float | None, peak: float | None) -> dict[str, float | None]:
    """Of a step with `batch` images and `work` FLOPs; all None where it did not fit (`seconds` is None)."""
    rate = work / seconds if seconds else None
    return {
        "seconds": seconds,
        "images_per_second": batch / seconds if seconds else None,
        "tflop_per_image": work / batch / 1e12,
        "tflops": rate / 1e12 if rate else None,
        "mfu": rate / peak if rate and peak else None,
    }


def where(device: torch.device) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": str(date.today()),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the page."""
    cells = [row["flavor"], f"{row['double']} + {row['single']}", row["size"], row["batch"], row["kind"]]
    cells += [row["policy"], "yes" if row["compile"] else "no", row["linears"]]
    if row["seconds"] is None:
        cells += ["out of memory", "", "", "", ""]
    else:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells += [f"{row['seconds'] * 1e3:.1f}", f"{row['images_per_second']:.3f}", f"{row['tflops']:.4g}"]
        cells += [mfu, f"{row['peak_gib']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def text_of(runs: list[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Throughput on one device",
        "",
        "Medians of steps after warm-up. TFLOP/s count matrix products, without recomputation; MFU is their",
        "share of the device's dense bfloat16 rate, in 8 bits too. Images/s are of a model with so many",
        "blocks, double + single. Peak memory is the allocator's; on a CPU, the process's resident peak.",
    ]
    names = ["flavor", "blocks", "px", "batch", "kind", "policy", "compiled", "8-bit linears", "step, ms"]
    names += ["images/s", "TFLOP/s", "MFU", "peak memory, GiB"]
    for run in runs:
        versions = f"torch {run['torch']}, CUDA {run['cuda']}, Python {run['python']}"
        lines += ["", f"{run['device']}, {versions}, {run['date']}:", "", f"    {run['command']}", ""]
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *map(line, run["rows"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
