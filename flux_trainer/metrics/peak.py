"""Peak arithmetic rate of known devices, the denominator of model FLOPs utilisation (MFU).

Dense bfloat16 tensor-core figures of the makers' data sheets, in TFLOP/s (headline figures are often "with
sparsity", twice these), so that runs in other precisions are measured against the same yardstick.
"""

from __future__ import annotations

import re

import torch

# Pattern in the device's name -> TFLOP/s. The first that matches wins: variants stand before the plain name.
PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB300\b", 2500.0),  # NVIDIA GB300 NVL72 data sheet: 360 PFLOP/s sparse by 72 GPUs
    (r"\bB300\b", 2250.0),  # NVIDIA HGX B300 data sheet
    (r"\bGB200\b", 2500.0),  # NVIDIA GB200 NVL72 data sheet: 360 PFLOP/s sparse by 72 GPUs
    (r"\bB200\b", 2250.0),  # NVIDIA HGX B200 data sheet
    (r"\bH200 NVL\b", 835.5),  # NVIDIA H200 data sheet
    (r"\bH200\b", 989.5),  # NVIDIA H200 data sheet (SXM)
    (r"\bGH200\b", 989.5),  # NVIDIA GH200 data sheet
    (r"\bH100 NVL\b", 835.5),  # NVIDIA H100 data sheet
    (r"\bH100 PCIe\b", 756.5),  # NVIDIA H100 PCIe product brief
    (r"\bH100\b", 989.5),  # NVIDIA H100 data sheet (SXM)
    (r"\bH800 PCIe\b", 756.5),
    (r"\bH800\b", 989.5),
    (r"\bH20\b", 148.0),  # NVIDIA H20 data sheet
    (r"\bA100\b", 312.0),  # NVIDIA A100 data sheet
    (r"\bA800\b", 312.0),
    (r"\bL40S\b", 362.0),  # NVIDIA L40S data sheet
    (r"\bL40\b", 181.0),  # NVIDIA L40 data sheet
    (r"\bL4\b", 121.0),  # NVIDIA L4 data sheet
    (r"\bA40\b", 149.7),  # NVIDIA A40 data sheet
    (r"\bA10\b", 125.0),  # NVIDIA A10 data sheet
    (r"\bRTX 5090\b", 209.5),  # NVIDIA RTX Blackwell white paper, fp32 accumulation
    (r"\bRTX 4090\b", 165.2),  # NVIDIA Ada white paper, fp32 accumulation
    (r"\bRTX 3090\b", 71.0),  # NVIDIA GA102 white paper, fp32 accumulation
    (r"\bMI355X\b", 2516.6),  # AMD Instinct MI355X data sheet
    (r"\bMI325X\b", 1307.4),  # AMD Instinct MI325X data sheet
    (r"\bMI300X\b", 1307.4),  # AMD Instinct MI300X data sheet
    (r"\bMI250X\b", 191.5),  # AMD Instinct MI250X data sheet: 383 for two dies, each a device
)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by the name its driver reports; None where it is not known."""
    for pattern, tflops in PEAK_BF16_TFLOPS:
        if re.search(pattern, device_name):
            return tflops * 1e12
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_flops` of a torch device; None for CPUs."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
