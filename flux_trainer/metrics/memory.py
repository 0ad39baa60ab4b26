"""Peak memory of this process: of the GPU where there is one, otherwise resident memory of the host."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 1 << 30


def memory_readings(device: torch.device) -> dict[str, float]:
    """Peaks since the last call (GPU) or since the process started (CPU), as fields of a metrics line.

    GPU: `memory_reserved_gib` and `_percent` of what the allocator has taken, `memory_active_gib` and
    `_percent` of the part that held tensors, `alloc_retries` and `ooms`: how often it ran out (a bad sign).
    CPU: `memory_rss_gib`, the process's resident memory.
    """
    if device.type != "cuda":
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"memory_rss_gib": rss / GIB}
    total = torch.cuda.get_device_properties(device).total_memory
    stats = torch.cuda.memory_stats(device)
    reserved, active = stats["reserved_bytes.all.peak"], stats["active_bytes.all.peak"]
    torch.cuda.reset_peak_memory_stats(device)
    return {
        "memory_reserved_gib": reserved / GIB,
        "memory_reserved_percent": 100 * reserved / total,
        "memory_active_gib": active / GIB,
        "memory_active_percent": 100 * active / total,
        "alloc_retries": stats["num_alloc_retries"],
        "ooms": stats["num_ooms"],
    }
