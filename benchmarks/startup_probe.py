"""What `startup.py` measures, in a process of its own: each command here prints one JSON object of seconds.

python benchmarks/startup_probe.py stages SETTINGS ...    up to the end of the first step
python benchmarks/startup_probe.py make FOLDER FLAVOR     a run's checkpoint and safetensors files
python benchmarks/startup_probe.py load FOLDER FLAVOR     load them, and only read their bytes
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BEGAN = "STARTUP_BEGAN"
"""Environment variable: when the process was asked for, on the system's monotonic clock."""

PYTHON, SETTINGS, TORCH, OURS = "Python", "settings", "import torch", "import flux_trainer.flux"
COMPILER, LIBRARY = "import torch._dynamo (by torch's optimizer)", "import transformers"
REST = "all else"
PARTS = {
    "process group and mesh": ("trainer.init_distributed", "trainer.build_mesh", "trainer.check_agreement"),
    "model and its weights": ("models.registry.build", "trainer.parallelize", "trainer.init_weights"),
    "optimizer": ("trainer.build_optimizer",),
    "figures and trackers": ("trainer.Writers",),
    "encoders": ("flux.Encoders",),
    "data workers, first batch": ("flux.TrainLoader", "data.loader.TrainLoader.__next__"),
    "first step": ("flux.FluxTrainer.micro_batches", "flux.FluxTrainer.train_step"),
}
"""Where the seconds are charged -> what is called there, below flux_trainer."""
IMPORTED_IN = {
    "trainer.build_optimizer": (COMPILER, {"torch": ["_dynamo"]}),
    "flux.Encoders": (
        LIBRARY,
        {"transformers": ["CLIPTextModel", "CLIPTokenizerFast", "T5EncoderModel", "T5TokenizerFast"]},
    ),
}
"""Call -> what it would import; it is imported before, and charged apart."""
BLOCK = 1 << 28  # bytes read at once: far more than the caches


class Clock:
    """Charges every moment to one part: the innermost that is going on."""

    def __init__(self, began: float, part: str) -> None:
        self.seconds: dict[str, float] = {}
        self._last, self._parts = began, [part]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.charge()
        self._parts.append(name)
        yield
        self.charge()
        self._parts.pop()

    def charge(self) -> None:
        now = time.monotonic()
        name = self._parts[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def stages(settings: list[str]) -> None:
    """Run `flux_trainer.train` with parts of it timed."""
    clock = Clock(float(os.environ[BEGAN]), PYTHON)
    with clock.part(SETTINGS):
        from flux_trainer import train as command
    train = command.train

    def timed(config: Any) -> int:
        with clock.part(TORCH):
            importlib.import_module("torch")
        with clock.part(OURS):
            importlib.import_module("flux_trainer.flux")
        for part, calls in PARTS.items():
            for call in calls:
                charge_to(clock, part, call)
        with clock.part(REST):
            return train(config)

    command.train = timed
    sys.argv = ["flux_trainer.train", *settings]
    with clock.part(SETTINGS):
        status = command.main()
    sys.exit(status)


def charge_to(clock: Clock, part: str, call: str) -> None:
    """Replace a function, class or method by one that charges its time to `part`."""
    owner, name = owner_of(call)
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original, updated=())
    def timed(*args: Any, **kwargs: Any) -> Any:
        if call in IMPORTED_IN:
            library, wanted = IMPORTED_IN[call]
            with clock.part(library):
                for module, names in wanted.items():
                    for each in names:
                        getattr(importlib.import_module(module), each)
        with clock.part(part):
            result = original(*args, **kwargs)
        if call == "flux.FluxTrainer.train_step":
            print(json.dumps(clock.seconds), flush=True)
        return result

    setattr(owner, name, timed)


def owner_of(call: str) -> tuple[Any, str]:
    """The module or class that has the last of the dotted names."""
    *path, name = call.split(".")
    owner = importlib.import_module("flux_trainer")
    for each in path:
        if not hasattr(owner, each):
            importlib.import_module(f"{owner.__name__}.{each}")
        owner = getattr(owner, each)
    return owner, name


def make(folder: Path, flavor: str) -> None:
    """Write `bf16.safetensors`, `fp32.safetensors`, and the checkpoint of a run with Adam in `step-1`."""
    import torch
    from safetensors.torch import save_file

    from flux_trainer.checkpoint.manager import CheckpointManager
    from flux_trainer.config.schema import Checkpoint
    from flux_trainer.hub.weights import note
    from flux_trainer.models.registry import FLAVORS
    from flux_trainer.runtime.dist import init_distributed

    tensors = {name: t.normal_(0, 0.02) for name, t in empty(flavor, moments=True).items()}
    weights = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    save_file(weights, folder / "fp32.safetensors")
    save_file({n: t.to(torch.bfloat16) for n, t in weights.items()}, folder / "bf16.safetensors")
    world = init_distributed()
    manager = CheckpointManager(Checkpoint(enable=True, folder="."), folder, world)
    manager.save(1, tensors, {"identity": {}, "model": note(FLAVORS[flavor])})
    manager.close()
    world.close()
    print("{}")


def empty(flavor: str, moments: bool) -> dict[str, Any]:
    """The float32 tensors of a run, in memory that has been written to before."""
    import torch

    from flux_trainer.models.registry import FLAVORS, model_class

    config = FLAVORS[flavor]
    with torch.device("meta"):
        model = model_class(config)(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if moments:
        keys = ("exp_avg", "exp_avg_sq")
        shapes |= {f"optimizer.state.{n}.{key}": shape for n, shape in shapes.items() for key in keys}
    return {name: torch.zeros(shape).add_(1) for name, shape in shapes.items()}


def load(folder: Path, flavor: str) -> None:
    """Fill a run's tensors from each of what `make` wrote; before each, read the same bytes."""
    from flux_trainer.checkpoint.load import load_run, verify
    from flux_trainer.hub.load import load_weights
    from flux_trainer.models.registry import FLAVORS

    seconds: dict[str, float] = {}
    buffer = memoryview(bytearray(BLOCK))
    config, tensors = FLAVORS[flavor], empty(flavor, moments=True)
    weights = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}

    def timed(name: str, run: Callable[[], object]) -> None:
        if name.startswith("read"):
            run()  # others' work may have pushed the file out of the cache
        start = time.perf_counter()
        run()
        seconds[name] = time.perf_counter() - start

    for name in ("bf16.safetensors", "fp32.safetensors"):
        path = folder / name
        timed(f"read {name}", lambda path=path: read([path], buffer))
        timed(f"load {name}", lambda path=path: load_weights(path, weights, config=config))
    step = folder / "step-1"
    timed("read step-1", lambda: read(sorted(step.iterdir()), buffer))
    timed("verify step-1", lambda: verify(step))
    timed("fill step-1", lambda: load_run(step, tensors))
    print(json.dumps(seconds))


def read(files: list[Path], buffer: memoryview) -> None:
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "stages":
        stages(words)
    else:
        {"make": make, "load": load}[command](Path(words[0]), words[1])
