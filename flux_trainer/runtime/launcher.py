"""A rank and the launcher that started it (torchrun, or `launch.py` around it). No torch."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

_PARENT = os.getppid()  # when this is imported: before torch, which takes seconds

SECOND_HAND = "second_hand"
"""Marks, in what a rank leaves, the sentence of one that ended because of another."""


def is_gone() -> bool:
    """Whether the launcher has died: nobody is left to end this rank, or to start it again."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT


def tell(sentence: str, *, second_hand: bool = False) -> None:
    """Leave the sentence by which this rank ends where its launcher will look.

    It has the form of torchrun's own reports, and stands there in the place of a traceback.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": sentence, "timestamp": str(int(time.time())), SECOND_HAND: second_hand}
        with suppress(OSError):  # the log has it
            Path(path).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
