"""Memory readings name what they measure."""

import torch

from flux_trainer.metrics.memory import memory_readings


def test_resident_memory_on_cpu():
    readings = memory_readings(torch.device("cpu"))
    assert set(readings) == {"memory_rss_gib"}
    assert 0.05 < readings["memory_rss_gib"] < 64  # a Python process with torch
