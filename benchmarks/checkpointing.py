"""Memory against time of every policy of activation checkpointing: forward and backward of one model.

    python benchmarks/checkpointing.py [--flavor flux-debug] [--dtype bfloat16] [--size 256] [--text 256]
        [--batch 1] [--rounds 7] [--double N --single N] [--compile] [--out benchmarks/results]

Writes OUT/checkpointing_FLAVOR.md, a table with hardware, versions and date, and a plot beside it. Weights
and gradients are in --dtype; nothing is sharded. --double and --single cut a model of full width to as many
blocks as fit. --compile adds compiled blocks, with and without a memory budget.

Memory is beside weights, gradients and inputs. On CUDA it is the allocator's; on a CPU, what tensors take
that operators return (in compiled blocks: what is saved for backward; their peak is not seen), without what
host offload would leave in host memory. Time on a CPU is the processor's, which others' work on the same
machine changes least. Policies take turns in one process; ratios are those of medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import lookup_backend, register_backend
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from flux_trainer.config.compute import ActivationCheckpoint, Compile
from flux_trainer.models import registry
from flux_trainer.models.configs import ModelConfig
from flux_trainer.models.flops import num_params
from flux_trainer.models.model import FluxModel
from flux_trainer.parallel import offload
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.estimate import describe
from flux_trainer.parallel.remat import apply_checkpointing, apply_memory_budget
from flux_trainer.runtime.live_bytes import LiveBytes

EAGER = [
    {"mode": "none"},
    {"mode": "selective", "selective_ac_option": "3"},
    {"mode": "selective", "selective_ac_option": "2"},
    {"mode": "selective"},
    {"mode": "attention"},
    {"mode": "attention", "single_blocks": "full"},
    {"mode": "full"},
    *({"mode": mode, "offload": True} for mode in ("none", "attention", "full")),
]
COMPILED = [
    {"mode": "none"},
    {"mode": "attention"},
    {"mode": "full"},
    *({"mode": "memory_budget", "memory_budget": budget} for budget in (0.75, 0.5, 0.25, 0.0)),
]
MIB = 1 << 20
numbers = count()


@dataclass
class Policy:
    """A policy, the model that runs under it, and what was measured."""

    section: ActivationCheckpoint
    compiled: bool
    model: FluxModel
    kept: int = 0
    """Bytes between forward and backward."""
    peak: int | None = None
    times: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return describe(self.section) + (", compiled" if self.compiled else "")

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavor", choices=[*registry.FLAVORS], default="flux-debug")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--size", type=int, default=256, help="pixels along an image's edge")
    parser.add_argument("--text", type=int, default=256, help="text tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--double", type=int, help="double-stream blocks, where not all")
    parser.add_argument("--single", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = registry.FLAVORS[args.flavor]
    depths = {"depth": args.double, "depth_single_blocks": args.single}
    config = replace(config, **{name: n for name, n in depths.items() if n is not None})
    torch.manual_seed(0)
    weights = weights_of(config, device, getattr(torch, args.dtype))
    given = inputs(config, args.batch, args.size, args.text, device)
    policies = [make(weights, section, False) for section in EAGER]
    if args.compile:
        policies += [make(weights, section, True) for section in COMPILED]

    for policy in policies:
        measure(policy, given)
    for number in range(args.rounds):
        for policy in policies if number % 2 else policies[::-1]:
            policy.times.append(timed(policy, given))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr)

    blocks = f"{config.depth} + {config.depth_single_blocks} blocks, {num_params(config):,} parameters"
    tokens = f"{args.batch} x ({(args.size // 16) ** 2} image + {args.text} text) tokens"
    shape = f"{args.flavor} ({blocks}), {tokens}, {args.dtype}"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"checkpointing_{args.flavor}.md"
    path.write_text(page(policies, shape, device, path.stem))
    plot(policies, shape, path.with_suffix(".png"))
    print(path.read_text())


def weights_of(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> FluxModel:
    """A model with random values in every parameter, and room for their gradients."""
    with torch.device("meta"):
        model = registry.model_class(config)(config)
    model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
        parameter.grad = torch.zeros_like(parameter)
    return model


def inputs(
    config: ModelConfig, batch: int, size: int, text: int, device: torch.device
) -> dict[str, Tensor | None]:
    image, axes = (size // 16) ** 2, len(config.axes_dim)
    given = {
        "image": torch.randn(batch, image, config.in_channels),
        "image_ids": torch.randint(0, 64, (batch, image, axes)).float(),
        "text": torch.randn(batch, text, config.context_in_dim),
        "text_ids": torch.zeros(batch, text, axes),
        "timesteps": torch.rand(batch),
        "pooled": torch.randn(batch, config.vec_in_dim),
        "guidance": torch.ones(batch),
    }
    return registry.model_class(config).arguments(**{name: x.to(device) for name, x in given.items()})


def make(weights: FluxModel, settings: dict, compiled: bool) -> Policy:
    """A model that shares all parameters of `weights`, made ready as `parallel/apply.py` does."""
    section = ActivationCheckpoint(**settings)
    with torch.device("meta"):
        model = registry.model_class(weights.config)(weights.config)
    for name, parameter in weights.named_parameters():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, parameter)
    blocks = [block for _, block in model.blocks()]
    away = offload.Offload() if section.offload else None
    apply_checkpointing(model.blocks(), section, None if compiled else away)
    compile_blocks(blocks, Compile(enable=compiled, backend=own_inductor() if compiled else "inductor"))
    apply_memory_budget(model.blocks(), section)
    if away:
        away.apply(blocks)
    return Policy(section, compiled, model)


def own_inductor() -> str:
    """A new name for inductor. Models share compiled graphs of one backend, whatever their memory budgets."""
    inductor, name = lookup_backend("inductor"), f"inductor_{next(numbers)}"
    register_backend(lambda graph, arguments: inductor(graph, arguments), name=name)
    return name


class Unseen(offload.Moved):
    """Copies to the host that no counter of tensors sees: on a CPU, host and device are one."""

    def __init__(self, there: Tensor, stream: torch.cuda.Stream | None) -> None:
        with _disable_current_modes():
            super().__init__(there, stream)


def measure(policy: Policy, given: dict[str, Tensor | None]) -> None:
    """Fill in `kept` and `peak`, in the second step: in the first, libraries take what they keep."""
    timed(policy, given)
    weights = [*policy.model.parameters()]
    present = [x for x in (*weights, *(p.grad for p in weights), *given.values()) if x is not None]
    if weights[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = policy.model(**given).square().mean()
        policy.kept = torch.cuda.memory_allocated() - before
        loss.backward()
        policy.peak = torch.cuda.max_memory_allocated() - before
    elif policy.compiled:
        policy.kept = saved(policy.model, given, present)
    else:
        plain, offload.Moved = offload.Moved, Unseen
        with LiveBytes() as live:
            for tensor in present:
                live.watch(tensor)
            before, live.peak = live.now, 0
            loss = policy.model(**given).square().mean()
            policy.kept = live.now - before
            loss.backward()
            policy.peak = live.peak - before
        offload.Moved = plain


def saved(model: FluxModel, given: dict[str, Tensor | None], present: list[Tensor]) -> int:
    """Bytes of the storages that autograd holds after forward, each once, beside those of `present`."""
    known = {x.untyped_storage()._cdata for x in present}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in known:
            held[x.untyped_storage()._cdata] = x.detach()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        model(**given).square().mean()
    return sum(x.untyped_storage().nbytes() for x in held.values())


def timed(policy: Policy, given: dict[str, Tensor | None]) -> float:
    """Seconds of a forward and backward; of processor time where there is no GPU."""
    if not next(policy.model.parameters()).is_cuda:
        start = time.process_time()
        policy.model(**given).square().mean().backward()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    policy.model(**given).square().mean().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def page(policies: list[Policy], shape: str, device: torch.device, name: str) -> str:
    first = policies[0]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, CPU"
    lines = [
        "# Activation checkpointing: memory against time",
        "",
        f"{shape}; forward and backward.",
        "",
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {date.today()}; medians of {len(first.times)} interleaved rounds:",
        "",
        f"    python benchmarks/checkpointing.py {shlex.join(sys.argv[1:])}".rstrip(),
        "",
        f"![memory against time]({name}.png)",
        "",
        "| policy | kept for backward, MiB | peak, MiB | time, s | time / none |",
        "|---|---|---|---|---|",
    ]
    for policy in policies:
        peak = "not seen" if policy.peak is None else f"{policy.peak / MIB:.1f}"
        lines.append(
            f"| {policy.name} | {policy.kept / MIB:.1f} | {peak} | {policy.median:.3f} "
            f"({min(policy.times):.3f} to {max(policy.times):.3f}) | {policy.median / first.median:.2f} |"
        )
    lines += ["", "Memory is beside weights, gradients and inputs."]
    if device.type != "cuda":
        lines += [
            "Seconds are of processor time.",
            "On a CPU, offload is a plain copy within the same memory: its time says nothing about a GPU. "
            "**On a GPU none of this has been measured.**",
        ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """As the kernel calls it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{os.cpu_count()} cores, {names[0].partition(': ')[2] if names else platform.machine()}"


def plot(policies: list[Policy], shape: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), constrained_layout=True)
    for policy in policies:
        x, y = policy.kept / MIB, policy.median / policies[0].median
        marker = "s" if policy.compiled else "^" if policy.section.offload else "o"
        axes.scatter(x, y, marker=marker, color="tab:green" if policy.compiled else "tab:blue")
        axes.annotate(policy.name, (x, y), (5, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="kept for backward on the device, MiB", ylabel="time / time of none", title=shape)
    axes.title.set_fontsize(8)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
