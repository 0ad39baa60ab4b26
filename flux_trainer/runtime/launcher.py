"""The launcher that started this rank (torchrun, or what stands in for it). No torch."""

from __future__ import annotations

import os

_PARENT = os.getppid()  # when this is imported: before torch, which takes seconds


def is_gone() -> bool:
    """Whether the launcher has died: nobody is left to end this rank, or to start it again."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT
