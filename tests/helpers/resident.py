"""How much memory this process has taken from the system, by Linux's own count."""

from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def peak() -> int:
    """Bytes resident at the most, since the start or the last `restart_peak`."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def restart_peak() -> int:
    """Let the peak start anew from what is resident now, which is returned."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
