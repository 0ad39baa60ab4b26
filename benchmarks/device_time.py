"""What a device does in a step: seconds, memory, and which kernels take the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

from flux_trainer.metrics.memory import GIB, memory_readings

# What a kernel is for, by its name: the first that matches. Those of a CPU are operators. The compiler names
# its kernels after all operators that are fused in them; only its templates (`tem`) are matrix products.
PARTS = (
    ("matrix products", ("triton_tem",)),
    ("compiled", ("triton_",)),
    ("attention", ("flash", "fmha", "sdpa", "attention", "dot_do_o", "convert_dq")),
    ("matrix products", ("gemm", "gemv", "nvjet", "cutlass", "splitk", "_scaled_mm")),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "_linear_pointwise")),
    ("optimizer", ("multi_tensor", "adam")),
    ("copies", ("memcpy", "memset")),
)
STEPS_IN_PROFILE = 2
KERNELS_SHOWN = 25
Step = Callable[[], object]


def timed(step: Step, count: int, device: torch.device) -> float:
    """Median seconds of a step; the host runs ahead of a GPU as it does in training."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            step()
            moments.append(time.perf_counter())
        return statistics.median(b - a for a, b in pairwise(moments))
    torch.cuda.synchronize(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(events))


def peak_memory(device: torch.device) -> float:
    """GiB of the allocator on a GPU; on a CPU what the process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return memory_readings(device)["memory_rss_gib"]


def part_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    name = kernel.lower()
    return next((part for part, words in PARTS if any(word in name for word in words)), "other")


def profiled(step: Step, device: torch.device) -> str:
    """The device's time by part and by kernel, as text; on a CPU that of operators."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    with torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(STEPS_IN_PROFILE):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
        wall = 1e3 * (time.perf_counter() - start) / STEPS_IN_PROFILE
    kernels = []  # (milliseconds of a step, calls, name)
    for event in profiler.key_averages():
        if on_gpu and (event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False)):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append((microseconds / 1e3 / STEPS_IN_PROFILE, event.count // STEPS_IN_PROFILE, event.key))
    total = sum(ms for ms, *_ in kernels)
    if not total:
        return "The profiler has seen no kernel; it may lack the right to.\n"
    lines = [f"{wall:.1f} ms a step under the profiler, {total:.1f} ms of them in kernels:"]
    for part in dict.fromkeys((*(part for part, _ in PARTS), "other")):
        ms = sum(ms for ms, _, name in kernels if part_of(name) == part)
        lines.append(f"  {part:<16}{ms:>10.2f} ms  {ms / total:>6.1%}")
    for ms, count, name in sorted(kernels, reverse=True)[:KERNELS_SHOWN]:
        lines.append(f"  {ms:>10.2f} ms  {ms / total:>6.1%}  {count:>6} x  [{part_of(name)}] {name[:120]}")
    return "\n".join(lines) + "\n"
