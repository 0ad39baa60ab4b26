"""`metrics.jsonl`: one JSON object per line, appended as the run goes, readable by anything.

A run that resumes from step N drops the lines after N that the interrupted run left behind, so no step
appears twice. Numbers that JSON does not have (NaN, infinity) become null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from flux_trainer.metrics.meter import Reading
from flux_trainer.runtime.files import write_text


class JsonLines:
    """Writes readings to a file; each line is flushed, so a killed run loses none."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Open `path`; keep its lines up to `resumed_step`.

        A new run (0) starts a new file: one that is there already is renamed to `metrics.previous.jsonl`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if resumed_step:
                _rewind(path, resumed_step)
            elif path.stat().st_size:  # of a start that failed before its first figure: nothing to keep
                path.replace(path.with_suffix(".previous.jsonl"))
        self._file = path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Reading) -> None:
        finite = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None


def _rewind(path: Path, step: int) -> None:
    """Drop the lines after `step`, and what follows a line that is not JSON (a crash tore it)."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record: Mapping[str, float] = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
