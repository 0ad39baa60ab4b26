"""How long one waits: for the first step, for imports, for a checkpoint.

    python benchmarks/startup.py [--rounds 5] [--flavor flux-debug] [--out benchmarks/results]

Each figure is the median over fresh processes, which take turns, after one round that does not count (it
fills the disk's cache with programs and checkpoints). The first step is that of
`train_configs/emoji_tiny.toml` with all its encoders and one data worker; where the seconds go is seen by a
process that times the trainer's parts (`startup_probe.py`). Reading is plain `read` of the same files into
memory that is used again and again; the tensors to fill have been written to before. Writes startup.md into
--out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

from startup_probe import BEGAN

ROOT = Path(__file__).parent.parent
PROBE = str(Path(__file__).with_name("startup_probe.py"))
# As run_train.sh does on a CPU, for what is started without it, too.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
FIRST_STEP = "step: 1/1"
SETTINGS = [
    *("--job.config_file", str(ROOT / "train_configs/emoji_tiny.toml")),
    "--training.steps=1",
    "--lr_scheduler.warmup_steps=0",
    "--metrics.log_freq=1",
    "--validation.enable=false",
    "--checkpoint.enable=false",
]
IMPORTS = ["torch", "flux_trainer", "flux_trainer.cli.main", "flux_trainer.flux", "flux_trainer.generate"]
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "flux-trainer --help": ["-m", "flux_trainer", "--help"],
    "flux-trainer config --help": ["-m", "flux_trainer", "config", "--help"],
}
TRAIN, LAUNCHER = "python -m flux_trainer.train", "NGPU=1 ./run_train.sh"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flavor", default="flux-debug", help="whose checkpoint to load")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        print("writing the checkpoints", file=sys.stderr)
        probe("make", folder, args.flavor)
        sizes = sizes_of(Path(folder))
        settings = [*SETTINGS, f"--job.dump_folder={folder}/run"]
        jobs: dict[str, Callable[[], Mapping[str, float]]] = {
            "imports": lambda: {name: import_time(name) for name in IMPORTS},
            "commands": lambda: {name: whole(words) for name, words in COMMANDS.items()},
            "train": lambda: {
                TRAIN: first_step([sys.executable, "-m", "flux_trainer.train", *settings]),
                LAUNCHER: first_step([str(ROOT / "run_train.sh"), *settings]),
            },
            "stages": lambda: probe("stages", *settings),
            "load": lambda: probe("load", folder, args.flavor),
        }
        found: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
        for number in range(args.rounds + 1):
            for name in list(jobs)[:: 1 if number % 2 else -1]:
                for what, seconds in jobs[name]().items():
                    if number:
                        found[name].setdefault(what, []).append(seconds)
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "startup.md"
    path.write_text(page(args, found, sizes, load_before), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


# One process each.


def environment() -> dict[str, str]:
    return {**KEEP_MEMORY, **os.environ, "NGPU": "1", "PYTHON": sys.executable, BEGAN: str(time.monotonic())}


def probe(*words: str) -> dict[str, float]:
    """What a command of `startup_probe.py` prints."""
    command = [sys.executable, PROBE, *words]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stderr}")
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def import_time(module: str) -> float:
    """Seconds of the import alone."""
    code = f"from time import perf_counter as t; s = t(); import {module}; print(t() - s)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    return float(done.stdout)


def whole(words: list[str]) -> float:
    """Seconds of a whole process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - start


def first_step(command: list[str]) -> float:
    """Seconds until the line of the first step is there; the process may end as it likes."""
    start, seen = time.perf_counter(), None
    lines = []
    with subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if FIRST_STEP in line:
                seen = time.perf_counter() - start
    if process.returncode or seen is None:
        sys.exit(f"{shlex.join(command)}\n{''.join(lines)}")
    return seen


def sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of what there is to load."""
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    return sizes | {"step-1": sum(path.stat().st_size for path in (folder / "step-1").iterdir())}


# The page.


def page(
    args: argparse.Namespace,
    found: Mapping[str, Mapping[str, list[float]]],
    sizes: Mapping[str, int],
    before: tuple[float, float, float],
) -> str:
    medians = {
        name: {what: statistics.median(seconds) for what, seconds in times.items()}
        for name, times in found.items()
    }
    command = shlex.join(["python", "benchmarks/startup.py", *sys.argv[1:]])
    after = os.getloadavg()
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    lines = [
        "# How long one waits",
        "",
        f"Written by `{command}` on {date.today()}:",
        f"medians of {args.rounds} fresh processes each, which took turns, all in the disk's cache.",
        f"{os.cpu_count()} cores of {cpu()}, OMP_NUM_THREADS {threads},",
        f"torch {version('torch')} (CPU), transformers {version('transformers')}, Python",
        f"{platform.python_version()}. Load average over 1 and 15 minutes: {before[0]:.1f} and",
        f"{before[2]:.1f} before, {after[0]:.1f} and {after[2]:.1f} after; this run adds about 1.",
        "On a GPU this has not been measured.",
        "",
        "## From the command to the first step",
        "flux-tiny on the embedded emoji (`train_configs/emoji_tiny.toml`): text encoders, autoencoder, one",
        "data worker. The launcher checks the settings, then starts torchrun, before the trainer begins.",
        "",
        "| command | first step after | least to most |",
        "|---|---|---|",
        *(row(name, seconds) for name, seconds in found["train"].items()),
        "",
        "Where they go, in a process that times the parts:",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
    ]
    stages = medians["stages"]
    total = statistics.median(map(sum, zip(*found["stages"].values(), strict=True)))
    lines += [f"| {name} | {s:.2f} s | {s / total:.0%} |" for name, s in stages.items()]
    lines += [
        f"| all | {total:.2f} s | |",
        "",
        "## Imports and commands",
        "",
        "| | median | least to most |",
        "|---|---|---|",
        *(row(f"import {name}", seconds) for name, seconds in found["imports"].items()),
        *(row(name, seconds) for name, seconds in found["commands"].items()),
        "",
        "## Loading a checkpoint",
        f"Of {args.flavor}, into float32 tensors. `step-1` is what a run with Adam leaves: weights and",
        "moments. A run that goes on first compares its files with their SHA-256, then fills its tensors.",
        "",
        "| what | size | read its bytes | load | load / read |",
        "|---|---|---|---|---|",
    ]
    times = medians["load"]
    for name in ("bf16.safetensors", "fp32.safetensors", "step-1"):
        reading = times[f"read {name}"]
        parts = [times[key] for key in (f"load {name}", f"verify {name}", f"fill {name}") if key in times]
        loading = sum(parts)
        told = f"{loading:.2f} s" if len(parts) == 1 else f"{' + '.join(f'{p:.2f}' for p in parts)} s"
        size = f"{sizes[name] / 1e9:.2f} GB"
        lines.append(f"| {name} | {size} | {reading:.2f} s | {told} | {loading / reading:.1f} |")
    return "\n".join([*lines, ""])


def row(name: str, seconds: list[float]) -> str:
    spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
    return f"| `{name}` | {statistics.median(seconds):.3f} s | {spread} |"


def cpu() -> str:
    found = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), found)
    return found


if __name__ == "__main__":
    main()
