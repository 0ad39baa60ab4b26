"""Forward and backward of our transformers, of torchtitan's and diffusers', and the matrix products alone.

    python benchmarks/peers.py [--flavors flux-debug flux2-debug] [--rounds 21] [--out benchmarks]

All have the same weights, inputs, dtype and threads. Before anything is timed, the output and the gradient of
every parameter are compared, each as |a - b| / |b| over the whole tensor; a difference above TOLERANCE ends
the run. Then they take turns in one process, so that a change in the machine's speed meets all, and the
ratios are those of the medians. A compiled model is compiled block by block: ours as the trainer does it,
torchtitan's as its `parallelize_flux` does, diffusers' by `compile_repeated_blocks`.

The floor is what no code can go below without computing less: the products of the linears and of attention in
forward and backward, with the shapes and strides that our eager model gives them (attention's scores twice,
for backward computes them again), one after the other and nothing between them. Writes peers.md into --out.
"""

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.config.compute import Compile
from flux_trainer.hub.families import family_of
from flux_trainer.models import on_cpu
from flux_trainer.models.keys import Entries, Layout, shapes, sources
from flux_trainer.models.layers import NORM_EPS
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import FLAVORS, model_class
from flux_trainer.parallel.compile import compile_blocks

OURS, TITAN, DIFFUSERS, FLOOR = "flux_trainer", "torchtitan", "diffusers", "matrix products"
HOW_TO_INSTALL = (
    "torchtitan 0.3.0 is not installed, so it is left out; "
    "`pip install --no-deps torchtitan==0.3.0 triton spmd_types==0.2.3 && pip install tyro einops` "
    "installs what its FLUX model needs."
)
ROWS = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-compiled": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
# As run_train.sh does on a CPU: freed memory stays with the process, where each step would take it anew.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@dataclass
class Contestant:
    """A model, and how its tensors correspond to the native ones."""

    name: str
    model: nn.Module
    arguments: Mapping[str, Any]
    entries: Entries
    compile: Callable[[], None]

    def forward(self) -> Tensor:
        out = self.model(**self.arguments)
        return out[0] if isinstance(out, tuple) else out

    def step(self, probe: Tensor) -> Tensor:
        """Forward and backward; gradients are there afterwards."""
        out = self.forward()
        out.backward(probe)
        return out.detach()

    def gradients(self) -> dict[str, Tensor]:
        """By native name."""
        theirs = {name: p.grad for name, p in self.model.named_parameters()}
        found = {}
        for name, entry in self.entries.items():
            parts = [theirs[run.name][run.start : run.start + run.length] for run in entry.runs]
            found[name] = torch.cat(parts).view(entry.shape)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavors", nargs="+", default=["flux-debug", "flux2-debug"])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--tokens", nargs=2, type=int, default=[256, 256], metavar=("IMAGE", "TEXT"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    lines = []
    for flavor in args.flavors:
        for row in args.rows:
            print(f"{flavor}, {row}", flush=True)
            contestants, probe = prepare(flavor, ROWS[row], *args.tokens)
            floor = products(contestants[0], probe)
            if row.endswith("compiled"):
                for contestant in contestants:
                    contestant.compile()
            compare(contestants, probe, TOLERANCE[ROWS[row]])
            times = measure(contestants, probe, floor, args.rounds)
            lines += table_lines(flavor, row, times)
            print(*lines[-len(times) :], sep="\n", flush=True)
            torch.compiler.reset()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "peers.md").write_text(page(args, lines), encoding="utf-8")


def prepare(flavor: str, dtype: torch.dtype, image: int, text: int) -> tuple[list[Contestant], Tensor]:
    """Ours first, then the peers, with the same weights; and the gradient [1, L_img, C] of their output."""
    config = FLAVORS[flavor]
    family, generator = family_of(config), torch.Generator().manual_seed(0)
    ours = model_class(config)(config)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            # Modulations too, which start at zero: otherwise most gradients would be.
            p.normal_(1.0 if name.endswith(".scale") else 0.0, 0.02, generator=generator)
    ours.to(dtype)

    def normal(length: int, channels: int) -> Tensor:
        return torch.randn(1, length, channels, generator=generator).to(dtype)

    side, axes = int(image**0.5), len(config.axes_dim)
    ids = torch.zeros(1, image, axes)
    ids[..., 1], ids[..., 2] = torch.arange(image) // side, torch.arange(image) % side
    given: dict[str, Any] = {
        "image": normal(image, config.in_channels),
        "image_ids": ids,
        "text": normal(text, config.context_in_dim),
        "text_ids": torch.zeros(1, text, axes),
        "timesteps": torch.tensor([0.5]),  # exact in bf16, as 1000 t is: diffusers and torchtitan round them
        "pooled": normal(1, config.vec_in_dim)[0],
        "guidance": torch.tensor([4.0]) if config.guidance_embed else None,
    }
    native = family.entries(config, "bfl")
    compile_ours = Compile(enable=True, components=["model"])
    contestants = [
        Contestant(
            OURS,
            ours,
            ours.arguments(**given),
            native,
            lambda: compile_blocks((block for _, block in ours.blocks()), compile_ours),
        )
    ]
    if flavor == "flux-debug" and (titan := torchtitan_model()) is not None:
        contestants.append(torchtitan(titan, ours, given, dtype))
    contestants.append(diffusers(ours, given, dtype))
    return contestants, normal(image, config.out_channels)


def torchtitan_model() -> nn.Module | None:
    """torchtitan's flux-debug; None, and a sentence, where it is not installed."""
    try:
        from torchtitan.models.flux import flux_configs
    except ImportError:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return None
    model: nn.Module = flux_configs["flux-debug"]().build()
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.eps = NORM_EPS  # torchtitan's is 1e-5, BFL's 1e-6
    return model


def torchtitan(model: nn.Module, ours: FluxModel, given: dict[str, Any], dtype: torch.dtype) -> Contestant:
    arguments = {
        "img": given["image"],
        "img_ids": given["image_ids"],
        "txt": given["text"],
        "txt_ids": given["text_ids"],
        "timesteps": given["timesteps"].to(dtype),
        "y": given["pooled"],
    }

    def compile_theirs() -> None:
        for block in chain(model.double_blocks, model.single_blocks):
            block.compile(backend="inductor", fullgraph=True)

    entries = take_weights(model, ours, "torchtitan", dtype)
    return Contestant(TITAN, model, arguments, entries, compile_theirs)


def diffusers(ours: FluxModel, given: dict[str, Any], dtype: torch.dtype) -> Contestant:
    import diffusers as library

    translation = family_of(ours.config).diffusers
    model = getattr(library, translation.class_name).from_config(translation.json(ours.config))
    arguments = {
        "hidden_states": given["image"],
        "encoder_hidden_states": given["text"],
        "timestep": given["timesteps"],
        "img_ids": given["image_ids"][0],
        "txt_ids": given["text_ids"][0],
        "guidance": given["guidance"],
        "return_dict": False,
        **({"pooled_projections": given["pooled"]} if ours.config.vec_in_dim else {}),
    }
    entries = take_weights(model, ours, "diffusers", dtype)
    return Contestant(
        DIFFUSERS, model, arguments, entries, lambda: model.compile_repeated_blocks(fullgraph=True)
    )


def take_weights(model: nn.Module, ours: FluxModel, layout: Layout, dtype: torch.dtype) -> Entries:
    """Give `model` the weights of ours; returns where they are."""
    entries = family_of(ours.config).entries(ours.config, layout)
    native, there = ours.state_dict(), shapes(entries)
    state = {}
    for name, parts in sources(entries).items():
        rows = [native[key][run.native : run.native + run.length] for key, run in parts]
        state[name] = torch.cat(rows).view(there[name])
    model.to(dtype).load_state_dict(state)
    return entries


def compare(contestants: list[Contestant], probe: Tensor, tolerance: float) -> None:
    """Print how far the peers' outputs and gradients are from ours; exit where that is too far."""
    ours, *peers = contestants
    out = ours.step(probe)
    gradients = ours.gradients()
    for peer in peers:
        theirs = peer.step(probe)
        errors = {name: error(gradients[name], g) for name, g in peer.gradients().items()}
        assert errors.keys() == gradients.keys()
        worst = max(errors, key=errors.__getitem__)
        print(
            f"  {peer.name}: output {error(out, theirs):.1e}, {len(errors)} gradients: median "
            f"{statistics.median(errors.values()):.1e}, largest {errors[worst]:.1e} ({worst})",
            flush=True,
        )
        if not max(errors[worst], error(out, theirs)) < tolerance:
            sys.exit(f"{peer.name} computes something else: the tolerance is {tolerance}. Nothing was timed.")
        peer.model.zero_grad()
    ours.model.zero_grad()


def error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


class Products(TorchDispatchMode):
    """Collects the operands of the matrix products within: pairs of (shape, strides)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []
        """Stand-ins, shared between products of the same shapes."""
        self.by_onednn: list[tuple[Tensor, Tensor]] = []
        """Likewise, of those that ask for it: the second is W of x W^T."""
        self._known: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.bmm.out):
            self.add(args[0], args[1])
        elif func in (aten.addmm.default, aten.baddbmm.out):
            self.add(args[1], args[2])
        elif func is torch.ops.flux_trainer.linear_by_onednn.default:
            self.by_onednn.append((self._stand_in(args[0]), self._stand_in(args[1])))
        elif func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            q, k, v = (x.flatten(0, 1) for x in args[:3])  # [B H, L, D]
            scores = q.new_empty(len(q), q.shape[1], k.shape[1])
            self.add(q, k.mT)
            self.add(scores, v)
        elif func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            grad, q, k, v = (x.flatten(0, 1) for x in args[:4])
            scores = q.new_empty(len(q), q.shape[1], k.shape[1])
            self.add(scores.mT, grad)  # of v
            self.add(grad, v.mT)  # of the probabilities
            self.add(scores, k)  # of q
            self.add(scores.mT, q)  # of k
        return func(*args, **(kwargs or {}))

    def add(self, a: Tensor, b: Tensor) -> None:
        self.found.append((self._stand_in(a), self._stand_in(b)))

    def _stand_in(self, x: Tensor) -> Tensor:
        key = (x.shape, x.stride())
        if key not in self._known:
            self._known[key] = torch.empty_strided(*key, dtype=x.dtype).normal_()
        return self._known[key]


def products(ours: Contestant, probe: Tensor) -> Callable[[], None]:
    """All matrix products of a step, into results that lie ready (oneDNN's bring theirs)."""
    with Products() as products:
        ours.step(probe)
    ours.model.zero_grad()
    results: dict[torch.Size, Tensor] = {}
    todo = []
    for a, b in products.found:
        shape = torch.Size((*a.shape[:-1], b.shape[-1]))
        todo.append((a, b, results.setdefault(shape, torch.empty(shape, dtype=a.dtype))))

    @torch.no_grad()
    def run() -> None:
        for a, b, result in todo:
            torch.matmul(a, b, out=result)
        for x, weight in products.by_onednn:
            on_cpu.linear_by_onednn(x, weight, None)

    return run


def measure(
    contestants: list[Contestant], probe: Tensor, floor: Callable[[], None], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each round, after one that does not count."""
    runs: dict[str, Callable[[], Any]] = {c.name: lambda c=c: c.step(probe) for c in contestants}
    runs[FLOOR] = floor
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for round_ in range(rounds + 1):
        for name in order if round_ % 2 else reversed(order):
            start = time.perf_counter()
            runs[name]()
            if round_:
                times[name].append(time.perf_counter() - start)
            for contestant in contestants:
                contestant.model.zero_grad()
    return times


def table_lines(flavor: str, row: str, times: dict[str, list[float]]) -> list[str]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours, lines = medians[OURS], []
    for name, values in times.items():
        ratio = "" if name == OURS else f"{ours / medians[name]:.3f}"
        spread = f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"| {flavor} | {row} | {name} | {medians[name]:.3f} s | {spread} | {ratio} |")
    return lines


def page(args: argparse.Namespace, lines: list[str]) -> str:
    command = shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]])
    image, text = args.tokens
    return "\n".join(
        [
            "# Our transformers against torchtitan's and diffusers'",
            "",
            f"Written by `{command}` on {date.today()}:",
            f"forward and backward, batch 1, {image} image and {text} text tokens, {args.threads} threads of",
            f"{cpu()}, medians of {args.rounds} interleaved rounds, {versions()}.",
            f"Load average {os.getloadavg()[2]:.1f} over the last 15 minutes, to which this run adds at most",
            f"{args.threads}.",
            "The matrix products alone are the floor. Not measured on a GPU.",
            "",
            "| model | row | who | median | least to most | ours / theirs |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def cpu() -> str:
    found = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), found)
    amx = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    return f"{found} ({torch.backends.cpu.get_cpu_capability()}{amx})"


def versions() -> str:
    found = []
    for name in ("torch", "torchtitan", "diffusers"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # glibc reads them as the process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_MEMORY, **os.environ})
    main()
